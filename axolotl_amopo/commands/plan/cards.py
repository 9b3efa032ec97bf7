"""Know graphics cards by name: their memory, and their speed at dense bf16 products."""

from dataclasses import dataclass

from axolotl_amopo.errors import AMoPOError, did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """Describe a device that holds one process."""

    name: str
    bytes: int  # memory that a process can have, less than the name says
    tflops: float  # dense bf16 (a T4: fp16) with float32 accumulation, from the vendor's data sheet


# Memory in GiB as the driver reports it (`torch.cuda.get_device_properties(0).total_memory`).
CARDS: dict[str, Card] = {
    name: Card(name, int(gib * GIB), tflops)
    for name, gib, tflops in (
        ("t4-16gb", 14.5, 65),
        ("rtx-3090-24gb", 23.6, 71),
        ("rtx-4090-24gb", 23.5, 165),
        ("rtx-5090-32gb", 31.3, 210),
        ("a10g-24gb", 22.0, 70),
        ("l4-24gb", 22.0, 121),
        ("a6000-48gb", 47.4, 155),
        ("l40s-48gb", 44.4, 362),
        ("a100-40gb", 39.4, 312),
        ("a100-80gb", 79.1, 312),
        ("h100-80gb", 79.1, 989),
        ("h200-141gb", 139.8, 989),
        ("b200-180gb", 178.3, 2250),
    )
}


def find_card(name: str, gib: float | None = None, tflops: float | None = None) -> Card:
    """Return a card of the table, with its memory (GiB) or speed (TFLOP/s) replaced where given.

    Raises:
        AMoPOError: for a name that isn't in the table, unless both numbers are given.
    """
    known = CARDS.get(name.lower())
    if known is None and (gib is None or tflops is None):
        raise AMoPOError(
            f"--gpu {name}: no such card in the table.{did_you_mean(name.lower(), CARDS)} Known: "
            f"{', '.join(CARDS)}; or describe yours with --gpu-memory GIB and --gpu-tflops NUMBER."
        )
    return Card(
        name,
        int(gib * GIB) if gib is not None else known.bytes,
        tflops if tflops is not None else known.tflops,
    )
