"""The parameters that IC-Custom adds to FLUX's attention: their names, shapes and files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

NAMES = ("cond_embedding", "target_embedding", "idx_embedding", "task_register_embeddings")
TASKS = ("free", "precise", "drawn")  # by task id
FILE = "ic_custom.safetensors"


class ICCustomParameters(nn.Module):
    """IC-Custom's boundary embeddings and task registers, shared by all layers; zeros before training.

    They have the names of the released files. Bring them to the model's dtype and device with `.to()`. They
    can be trained: gradients reach them through the attention.

    Args:
        hidden: heads * head_dim of the model; 3072 in FLUX.1.
        references: the largest number of panels beside the target.
        registers: key and value tokens for each task; 0: none.

    Examples:
        >>> from flashbrush.integrations import ICCustomParameters
        >>> parameters = ICCustomParameters(3072, references=2)
        >>> file = parameters.save_pretrained("ic-custom")
        >>> ICCustomParameters.from_pretrained("ic-custom").hidden
        3072
    """

    def __init__(self, hidden: int = 3072, *, references: int = 10, registers: int = 4) -> None:
        super().__init__()
        self.cond_embedding = nn.Embedding(1, hidden)
        self.target_embedding = nn.Embedding(1, hidden)
        self.idx_embedding = nn.Embedding(references, hidden)
        self.task_register_embeddings = nn.Embedding(len(TASKS) * 2 * registers, hidden)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @property
    def hidden(self) -> int:
        """Channels of all heads together."""
        return self.cond_embedding.embedding_dim

    def boundary(self, references: int) -> Tensor:
        """The embedding of each panel, (references + 1, hidden): cond + idx[k], and the target's last."""
        return torch.cat(
            [
                self.cond_embedding.weight + self.idx_embedding.weight[:references],
                self.target_embedding.weight,
            ]
        )

    def registers(self, task: str) -> tuple[Tensor, Tensor]:
        """The keys and values of a task, (registers, hidden) each."""
        table = self.task_register_embeddings.weight
        keys, values = table.unflatten(0, (len(TASKS), 2, table.shape[0] // (2 * len(TASKS))))[
            TASKS.index(task)
        ]
        return keys, values

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> ICCustomParameters:
        """Read published parameters, or those of save_pretrained().

        Args:
            path: a safetensors file, or a folder whose safetensors files together hold all parameters. Other
                tensors in them are not read.

        Raises:
            FileNotFoundError: no such file or folder.
            ValueError: no safetensors file; a name that is missing or there twice; shapes that do not fit.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"path: no such file or folder: {path}")
        found: dict[str, Tensor] = {}
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            try:
                with safe_open(file, "pt") as tensors:
                    for key in sorted(tensors.keys()):
                        name = key.removesuffix(".weight")
                        if name in found:
                            raise ValueError(f"path: {name} is twice in {path}; name one file")
                        if name in NAMES:
                            found[name] = tensors.get_tensor(key)
            except SafetensorError as error:
                raise ValueError(f"path: {file} is not a safetensors file ({error})") from error
        if missing := [name for name in NAMES if name not in found]:
            raise ValueError(f"path: {path} has no {', '.join(missing)}; expected all of {', '.join(NAMES)}")
        tables = {name: table.reshape(-1, table.shape[-1]) for name, table in found.items()}
        cond, target, idx, registers = (tables[name].shape for name in NAMES)
        channels = {table.shape[1] for table in tables.values()}
        if cond[0] != 1 or target[0] != 1 or registers[0] % (2 * len(TASKS)) or len(channels) > 1:
            shapes = ", ".join(f"{name} {tuple(found[name].shape)}" for name in NAMES)
            raise ValueError(
                f"path: expected (1, n), (1, n), (references, n), (6 * registers, n), got {shapes}"
            )
        self = cls(cond[1], references=idx[0], registers=registers[0] // (2 * len(TASKS)))
        self.to(found[NAMES[0]].dtype).load_state_dict(
            {f"{name}.weight": table for name, table in tables.items()}
        )
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ic_custom.safetensors.

        Args:
            folder: where to; made if it is missing.

        Returns:
            The file's path.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}, folder / FILE
        )
        return folder / FILE
