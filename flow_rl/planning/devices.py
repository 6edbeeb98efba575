"""Accelerators by name: memory and peak speed, as their vendors state them. Nothing here was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flow_rl.errors import SettingError
from flow_rl.suggestions import nearest

GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator.

    Attributes:
        name: as on the command line.
        memory: bytes; the vendor's gigabytes taken as 10^9, which is a little less than the card has and leaves that
            much for the driver's context and for fragmentation.
        tflops: peak dense bfloat16, 10^12 operations a second.
    """

    name: str
    memory: int
    tflops: float


#: dense bfloat16 peaks (not the figures "with sparsity") of the vendors' data sheets
DEVICES = {
    device.name: device
    for device in (
        Device(name="H100-80GB", memory=80 * GB, tflops=989),
        Device(name="H200", memory=141 * GB, tflops=989),
        Device(name="H20", memory=96 * GB, tflops=148),
        Device(name="A100-80GB", memory=80 * GB, tflops=312),
        Device(name="A100-40GB", memory=40 * GB, tflops=312),
        Device(name="L40S", memory=48 * GB, tflops=362),
        Device(name="RTX4090", memory=24 * GB, tflops=165),
        Device(name="MI300X", memory=192 * GB, tflops=1307),
    )
}


def find_device(name: str) -> Device:
    """A device by name, whatever its case.

    Raises:
        SettingError: an unknown one.
    """
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() not in known:
        longer = [known_as for known_as in DEVICES if known_as.lower().startswith(name.lower())]
        hint = f" Did you mean '{longer[0]}'?" if longer else nearest(name, DEVICES)
        raise SettingError(f"--device: unknown device '{name}'.{hint} Known: {', '.join(DEVICES)}.")
    return known[name.lower()]


def parse_fleet(text: str) -> tuple[int, Device]:
    """How many of which device `8xH100-80GB` is.

    Raises:
        SettingError: not of that form, none, or an unknown device.
    """
    match = re.fullmatch(r"(\d+)\s*x\s*(\S+)", text.strip())
    if match is None or int(match[1]) < 1:
        raise SettingError(f"--fit takes a number and a device, such as 8xH100-80GB; received '{text}'.")
    return int(match[1]), find_device(match[2])
