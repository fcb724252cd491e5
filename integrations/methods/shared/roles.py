"""Roles: which item of a call's batch is the source, the edit, the query, the appearance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EditRoles:
    """A source and its edit, in one half of classifier-free guidance.

    Args:
        source: batch item of the image that is kept.
        target: batch item of its edit.

    Examples:
        >>> from flashbrush.integrations import EditRoles
        >>> EditRoles.stacked(edits=1)  # of the batch [source, edit] without and with the prompt
        (EditRoles(source=0, target=1), EditRoles(source=2, target=3))
    """

    source: int
    target: int

    @staticmethod
    def stacked(edits: int = 1, halves: int = 2) -> tuple[EditRoles, ...]:
        """The roles in batches [source, edit_1, ..., edit_n], `halves` times one after the other.

        Args:
            edits: n.
            halves: 2 where a batch holds both halves of classifier-free guidance.

        Raises:
            ValueError: `edits` or `halves` below 1.
        """
        _at_least_one(edits=edits, halves=halves)
        return tuple(
            EditRoles(first, first + n)
            for first in range(0, halves * (edits + 1), edits + 1)
            for n in range(1, edits + 1)
        )


@dataclass(frozen=True)
class MutualRoles:
    """InfEdit's three items, in one half of classifier-free guidance.

    Args:
        source: batch item of the image that is kept.
        target: batch item of its edit.
        mutual: batch item with the edit's layout and the source's contents.
        conditional: whether this is the conditional half, whose cross-attention is edited.

    Examples:
        >>> from flashbrush.integrations import InfEdit, MutualRoles, PromptEdit
        >>> method = InfEdit(PromptEdit(), items=MutualRoles(source=2, target=0, mutual=1))
        >>> method.items
        (MutualRoles(source=2, target=0, mutual=1, conditional=True),)
    """

    source: int = 0
    target: int = 1
    mutual: int = 2
    conditional: bool = True


@dataclass(frozen=True)
class TransferRoles:
    """The three items of an appearance transfer.

    Args:
        output: batch item of the result.
        appearance: batch item of the image whose appearance it takes.
        structure: batch item of the image whose structure it takes.

    Examples:
        >>> from flashbrush.integrations import CrossImageAttention, TransferRoles
        >>> method = CrossImageAttention(items=TransferRoles(output=2, appearance=0, structure=1))
        >>> method.items
        (TransferRoles(output=2, appearance=0, structure=1),)
    """

    output: int = 0
    appearance: int = 1
    structure: int = 2


@dataclass(frozen=True)
class InContextRoles:
    """The items of a visual in-context task: example pairs (A_k, B_k), a query C and its prediction D.

    Args:
        prompts: pairs of batch items (A_k, B_k), at least one.
        query: batch item of C.
        prediction: batch item of D.

    Raises:
        ValueError: `prompts` holds no pair, or something else than pairs.

    Examples:
        >>> from flashbrush.integrations import InContextRoles
        >>> InContextRoles.stacked(prompts=2, plain=False)  # of the batch [A_1, B_1, A_2, B_2, C, D]
        (InContextRoles(prompts=((0, 1), (2, 3)), query=4, prediction=5),)
    """

    prompts: tuple[tuple[int, int], ...]
    query: int
    prediction: int

    def __post_init__(self) -> None:
        if not self.prompts or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in self.prompts):
            raise ValueError(
                f"prompts: expected pairs of items (A_k, B_k), at least one, got {self.prompts!r}"
            )

    @staticmethod
    def stacked(prompts: int = 1, plain: bool = True, repeats: int = 1) -> tuple[InContextRoles, ...]:
        """The roles in batches [A_1, B_1, ..., A_n, B_n, C, D plain, D], `repeats` times one after the other.

        Args:
            prompts: n.
            plain: whether an item "D plain" with ordinary attention is there, as swap guidance needs it.
            repeats: 2 where a batch holds both halves of classifier-free guidance.

        Raises:
            ValueError: `prompts` or `repeats` below 1.
        """
        _at_least_one(prompts=prompts, repeats=repeats)
        length = 2 * prompts + 2 + plain
        return tuple(
            InContextRoles(
                tuple((start + 2 * k, start + 2 * k + 1) for k in range(prompts)),
                start + 2 * prompts,
                start + length - 1,
            )
            for start in range(0, repeats * length, length)
        )


def edit_roles(items: Sequence[EditRoles] | None, batch: int) -> tuple[EditRoles, ...]:
    """`items`, or the roles in a batch [source, edit_1, ..., edit_n] twice: unconditional, conditional."""
    if items is not None:
        return tuple(items)
    if batch < 4 or batch % 2:
        raise ValueError(
            "items: without them a batch is [source, edit_1, ..., edit_n] twice, unconditional and "
            f"conditional, got {batch} items"
        )
    return EditRoles.stacked(batch // 2 - 1)


def conditional_edit_roles(items: Sequence[EditRoles] | None, batch: int) -> tuple[EditRoles, ...]:
    """`items`, or the roles in the second, conditional half of such a batch."""
    roles = edit_roles(items, batch)
    return roles if items is not None else roles[len(roles) // 2 :]


def mutual_roles(items: Sequence[MutualRoles] | None, batch: int) -> tuple[MutualRoles, ...]:
    """`items`, or the roles in a batch [source, target, mutual], once or twice."""
    if items is not None:
        return tuple(items)
    if batch not in (3, 6):
        raise ValueError(
            f"items: without them a batch is [source, target, mutual], once or twice, not {batch} items"
        )
    return (MutualRoles(),) if batch == 3 else (MutualRoles(conditional=False), MutualRoles(3, 4, 5))


def in_context_roles(items: Sequence[InContextRoles] | None, batch: int) -> tuple[InContextRoles, ...]:
    """`items`, or the roles in a batch [A_1, B_1, ..., A_n, B_n, C, D]."""
    if items is not None:
        return tuple(items)
    if batch < 4 or batch % 2:
        raise ValueError(f"items: without them a batch is [A_1, B_1, ..., A_n, B_n, C, D], got {batch} items")
    return InContextRoles.stacked(batch // 2 - 1, plain=False)


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
