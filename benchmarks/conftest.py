"""Our description of the machine in pytest-benchmark's file."""

from __future__ import annotations

from flashbrush.integrations.evaluation import machine


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["flashbrush"] = machine.describe()
    machine_info.pop("node", None)  # the host's name stays private
