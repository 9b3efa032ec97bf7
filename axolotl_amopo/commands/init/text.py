"""What was found in a dataset, for people at a terminal."""

from axolotl_amopo.commands.init.look import Look


def summary(found: Look) -> str:
    """Return what the config is made of, a fact per line."""
    lines = [f"{found.path}: {found.fit}.", *(f"  or {fit}" for fit in found.runners_up)]
    lines += [f"  to fill in: {item}" for item in found.fit.fill_in]
    if found.dimensions:
        lines.append(
            f"{found.rows} rows, {found.prompts} prompts, {found.responses} responses, "
            f"{found.pairs} pairs"
        )
    for dimension in found.dimensions:
        low, high = dimension.scale
        lower = ", lower is better" * dimension.lower
        lines.append(f"  {dimension.name}: {low:g} to {high:g}{lower}")
    for first, second, share in (item for item in found.conflicts[:3] if item[2]):
        lines.append(f"  {first} and {second} name different winners in {share:.0%} of the pairs")
    if found.tokens:
        count, longest = found.tokens["50%"], found.tokens["longest"]
        lines.append(f"{count} tokens at the median, {longest} at most ({found.counted})")
    return "\n".join(lines)
