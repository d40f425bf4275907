"""Tables and figure of the memory page, with the published numbers for comparison."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.shared import plots, study
from experiments.shared.timing import over
from experiments.training.baselines import TIED

# Gigabytes at T = 150, batch 15 without embeddings: the paper's Table 3. No time was published for the second.
# 70-layer TrellisNet, and DEQ-TrellisNet. The paper does not say where its checkpoints stand.
PUBLISHED = {"plain": 24.7, "checkpointed": 5.2, "√L-checkpointed": 5.2, "Implicit": 3.3}
PUBLISHED_DEPTH = 70
EXPLICIT = tuple(TIED)
EQUILIBRIUM = ("Implicit", "Implicit, Broyden", "Phantom(5)", "Reversible")
MODES = (*EXPLICIT, *EQUILIBRIUM)
LARGER = "larger"


def table(results: dict[str, Any]) -> str:
    config = results["config"]
    told = study.conditions(results, dtype="float32", seed=config["seed"])
    lines = ["# Memory, time and quality by gradient and depth", "", f"    {results['command']}", "", f"{told}.", ""]
    lines += published_table(config["published"], results["published"])
    for family, part in results["families"].items():
        lines += family_table(config, family, part)
    return "\n".join(lines)


def published_table(shape: dict[str, Any], sizes: dict[str, float]) -> list[str]:
    lines = [f"## DEQTrellisNet of {PUBLISHED_DEPTH} layers: temporaries of the compiled training step, GB", ""]
    lines += [f"The paper's Table 3: {shape['dim']} channels and {shape['inner_dim']} that are decoded, batch"]
    lines += [f"{shape['batch']}, T {shape['length']}, without embeddings; planned by XLA for the CPU, not run. The"]
    lines += [
        "published figures are of whole processes on a GPU, whose checkpoints stand where the paper does not say.",
        "",
    ]
    ratio = lambda sizes, name: f"{sizes[name] / sizes['plain']:.3f}" if name in sizes else ""
    published = lambda name: f"{PUBLISHED[name]:.1f}" if name in PUBLISHED else ""
    lines += plots.markdown_table(["", "published", "/ plain", "here", "/ plain"], [
        [name, published(name), ratio(PUBLISHED, name), f"{size / 1e9:.2f}", ratio(sizes, name)]
        for name, size in sizes.items()
    ])  # fmt: skip
    return lines


def family_table(config: dict[str, Any], family: str, part: dict[str, Any]) -> list[str]:
    shape, memory = config["compiled"], part["memory"]
    lines = [f"## {family}: temporaries of the compiled training step, GB", ""]
    lines += [
        f"Width {shape['dim']}, inner {shape['inner_dim']:,}, batch {shape['batch']}, T {shape['length']}, memory"
    ]
    lines += [f"{shape['mem_len']}, without embeddings; planned by XLA for the CPU, not run. Reversible at 128 is"]
    lines += ["compiled only: float32 can walk back about ten steps.", ""]
    depths = sorted({int(d) for sizes in memory.values() for d in sizes})
    lines += plots.markdown_table(["", *(f"L = {d}" for d in depths)], [
        [name, *(f"{sizes[str(d)] / 1e9:.2f}" if str(d) in sizes else "" for d in depths)]
        for name, sizes in memory.items()
    ])  # fmt: skip
    if rows := against_published(memory):
        lines += [
            f"At {PUBLISHED_DEPTH} layers, over the plain network's; the published ones are of 70-layer TrellisNet"
        ]
        lines += ["and DEQ-TrellisNet (24.7, 5.2 and 3.3 GB), of another cell on another machine, with checkpoints at"]
        lines += ["places that the paper does not tell.", ""]
        lines += plots.markdown_table(["", "published", "here"], rows)
    crossing = {name: break_even(memory[name], max(memory["Implicit"].values())) for name in EXPLICIT}
    words = [f"{name} from {depth:.0f}" for name, depth in crossing.items() if depth is not None]
    lines += [f"Layers from which an explicit network needs more than Implicit does: {', '.join(words) or 'none'}.", ""]
    shape, depth = config["measured"], max(config["measured_depths"])
    lines += [f"Planned and used, MB: L = {depth}, width {shape['dim']}, inner {shape['inner_dim']}, batch"]
    lines += [
        f"{shape['batch']}, T {shape['length']}. Used is the growth of the process's resident memory in one step.",
        "",
    ]
    lines += plots.markdown_table(["", "planned", "used"], [
        [name, f"{row['temp_bytes'] / 1e6:.1f}", megabytes(row["used_bytes"])] for name, row in part["used"].items()
    ])  # fmt: skip
    lines += ["## Time of a training step", ""]
    lines += ["The same shape: processor time over the plain network's of the same depth, all in turn"]
    lines += [f"{config['repeats']} times, by minima (by medians). The equilibrium of the untrained network stops at a"]
    lines += [f"relative residual of {config['rtol']:g} or at L evaluations; Reversible at 21 at most.", ""]
    depths = list(part["times"])
    head = ["", *(f"L = {depth}" for depth in depths), f"evaluations at {depths[-1]}"]
    cell = lambda depth, name: over(part["times"][depth], name, "plain") if name in part["times"][depth] else ""
    spent = lambda name: f"{part['times'][depths[-1]][name]['fwd_steps']:.0f}" if cell(depths[-1], name) else ""
    lines += plots.markdown_table(head, [
        [name, *(cell(depth, name) for depth in depths), depths[-1] if name in EXPLICIT else spent(name)]
        for name in MODES
    ])  # fmt: skip
    return lines + quality_table(config, part)


def megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def break_even(sizes: dict[str, float], size: float) -> float | None:
    """The depth at which `sizes` exceed `size`, interpolated between two depths; None if outside their range."""
    depths, known = np.array([int(d) for d in sizes]), np.array(list(sizes.values()))
    above = int(np.searchsorted(known, size))
    if above in (0, len(known)):
        return float(depths[0]) if above == 0 else None
    return float(np.interp(size, known[above - 1 : above + 1], depths[above - 1 : above + 1]))


def against_published(memory: dict[str, Any]) -> list[list[Any]]:
    """Rows of the published ratio and ours, where both have that depth; an equilibrium's memory is the same at all."""
    plain = memory["plain"].get(str(PUBLISHED_DEPTH))
    if plain is None:
        return []
    ours = {name: memory[name].get(str(PUBLISHED_DEPTH)) for name in EXPLICIT}
    ours |= {name: max(memory[name].values()) for name in EQUILIBRIUM}
    return [
        [name, f"{PUBLISHED[name] / PUBLISHED['plain']:.3f}" if name in PUBLISHED else "", f"{size / plain:.3f}"]
        for name, size in ours.items()
        if size is not None
    ]


def quality_table(config: dict[str, Any], part: dict[str, Any]) -> list[str]:
    runs, at, larger = part["runs"], part["equal_time"], part["larger"]
    lines = [f"## Quality: {config['data']}, by {config['level']}s, {config['layers']} layers or an equilibrium", ""]
    lines += [
        f"All start after {config['shallow_steps']} steps through two layers; then {config['steps']} steps each at"
    ]
    lines += ["a constant learning rate. Validation loss in nats at equal steps, and when the fastest had ended (the"]
    lines += ["line between measurements). The √L-checkpointed network is the plain one's arithmetic: its losses are"]
    lines += ["that run's, its time that of its own step, measured in turn with the plain one's.", ""]
    base = runs["plain"]["curve"][-1]["cpu_seconds"]
    lines += plots.markdown_table(["", "width", "parameters", "time / plain", "at equal steps", "at equal time"], [
        [name, run["dim"], f"{run['parameters']:,}", f"{run['curve'][-1]['cpu_seconds'] / base:.2f}",
         f"{run['curve'][-1]['valid_loss']:.3f}", f"{at['losses'][name]:.3f}"]
        for name, run in runs.items()
    ])  # fmt: skip
    fast, slow = larger["fast"], larger["slow"]
    ratio = larger["times"][slow]["cpu_min"] / larger["times"][fast]["cpu_min"]
    tried = ", ".join(f"× {width}: {t:.2f}" for width, t in larger["time_over_slow"].items())
    lines += [
        f"The larger model: a step of {slow} took {ratio:.2f} times one of {fast}, so {fast} was widened; time of"
    ]
    lines += [f"its step over {slow}'s by width, {tried}. × {larger['width']:g} is the nearest.", ""]
    return lines


COLORS = {
    "plain": plots.COLORS["unrolled"],
    "checkpointed": plots.COLORS["unrolled"],
    "√L-checkpointed": plots.COLORS["unrolled"],
    "Implicit": plots.ADJOINT_COLORS["Implicit"],
    "Implicit, Broyden": plots.COLORS["Broyden"],
    "Phantom(5)": plots.ADJOINT_COLORS["Phantom(5, 0.8)"],
    "Reversible": plots.ADJOINT_COLORS["Reversible"],
}
DASHES = {"plain": "-", "checkpointed": ":", "√L-checkpointed": "--"}


def draw(results: dict[str, Any], path: Path) -> None:
    """One row per family: bytes by depth, time by depth, validation loss by processor time."""
    plt = plots.plt
    config, families = results["config"], results["families"]
    with plt.rc_context(plots.STYLE):
        size = (14.5, 0.6 + 4.4 * len(families))
        figure, rows = plt.subplots(len(families), 3, figsize=size, layout="constrained", squeeze=False)
        for (memory, times, quality), part in zip(rows, families.values(), strict=True):
            draw_memory(memory, part["memory"])
            draw_times(times, part["times"])
            draw_quality(quality, part, config["layers"])
        rows[0][0].legend(frameon=False, fontsize=8)
        rows[0][2].legend(frameon=False, fontsize=8)
        note = f"{results['command']}; float32, seed {config['seed']}; {study.shared_cores(results['machine'])}"
        figure.supxlabel(note, fontsize=8, family="monospace")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def style(name: str) -> dict[str, Any]:
    kind = name.removeprefix(LARGER).strip()
    wide = dict(marker="D", lw=2) if name.startswith(LARGER) else dict(marker="o", lw=1.3)
    # Draw Implicit above modes that have the same memory.
    return dict(color=COLORS[kind], ls=DASHES.get(kind, "-"), ms=4, label=name, zorder=3 + (kind == "Implicit"), **wide)


def draw_memory(axes: Any, memory: dict[str, Any]) -> None:
    for name, sizes in memory.items():
        axes.loglog([int(d) for d in sizes], [size / 1e9 for size in sizes.values()], base=2, **style(name))
    depths = sorted({int(d) for sizes in memory.values() for d in sizes})
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    deepest = max(int(d) for d in memory["plain"])
    ours = max(memory["Implicit"].values())
    more = {name: memory[name][str(deepest)] / ours for name in EXPLICIT}
    crossing = break_even(memory["checkpointed"], ours)
    least = f"{'over ' * (crossing is None)}{crossing or deepest:.0f}"
    axes.set_title(
        plots.fill(
            f"with a checkpoint at every layer, {least} layers need as much memory as Implicit; {deepest} need "
            f"{more['checkpointed']:.2f} times it, {more['√L-checkpointed']:.1f} at √L, {more['plain']:.1f} plain"
        )
    )
    axes.set(xlabel="layers, or evaluations allowed", ylabel="temporaries of the compiled step (GB), paper's shape")


def draw_times(axes: Any, times: dict[str, Any]) -> None:
    base = times[min(times, key=lambda depth: abs(int(depth) - 12))]["plain"]["cpu_min"]
    depths = [int(d) for d in times]
    for name in MODES:
        known = [d for d in depths if name in times[str(d)]]
        relative = [times[str(d)][name]["cpu_min"] / base for d in known]
        axes.loglog(known, relative, base=2, **style(name))
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    deepest = times[str(max(depths))]
    ratios = {name: deepest[name]["cpu_min"] / deepest["plain"]["cpu_min"] for name in ("checkpointed", "Implicit")}
    axes.set_title(
        plots.fill(
            f"at {max(depths)} layers a checkpoint at every layer takes {ratios['checkpointed']:.2f}× "
            f"the plain network's time, Implicit {ratios['Implicit']:.2f}×"
        )
    )
    nearest = min(depths, key=lambda depth: abs(depth - 12))
    axes.set(xlabel="layers, or evaluations allowed", ylabel=f"processor time of a step / plain, {nearest} layers")


def draw_quality(axes: Any, part: dict[str, Any], layers: int) -> None:
    runs, at = part["runs"], part["equal_time"]
    base = runs["plain"]["curve"][-1]["cpu_seconds"]
    for name, run in runs.items():
        points = run["curve"][1:]  # all start at the same loss, far above the rest
        axes.plot([p["cpu_seconds"] / base for p in points], [p["valid_loss"] for p in points], **style(name))
    axes.axvline(at["cpu_seconds"] / base, color="0.6", lw=0.8, ls=":")
    told = [name for name in runs if name in ("plain", "√L-checkpointed", "Implicit") or name.startswith(LARGER)]
    axes.set_title(
        plots.fill("at equal time (dotted): " + ", ".join(f"{name} {at['losses'][name]:.3f}" for name in told))
    )
    axes.grid(alpha=0.2)
    axes.set(xlabel=f"processor time relative to the plain {layers} layers", ylabel="validation loss (nats/token)")
