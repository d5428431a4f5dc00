"""A plan as text and tables."""

from rich.table import Table

from davae.planner.plan import VARIANTS, Plan

STAGES = ("autoencoder", "diffusion")
TRAINED = {"base": "none", "native": "none", "decoder alone": "autoencoder", "upgraded": "both"}
"""The stages that a variant needs; ``native`` needs none where the base knows the full resolution."""


def stage_line(plan: Plan, stage: str) -> str:
    """One line on a training stage: trained weights, memory and hours. Recipes have it as a comment."""
    run = plan.runs[stage]
    return (
        f"{stage}: {plan.trained_parameters[stage] / 1e6:.0f}M trainable parameters, "
        f"{_gigabytes(plan.memory_bytes[stage])} at batch {run['batch_size']}, "
        f"{plan.training_hours[stage]:.3g} hours on one {plan.gpu} for {run['steps']:,} steps"
    )


def inference_line(plan: Plan) -> str:
    """One line on sampling: tokens, memory, operations of an image with text and decoding. Recipes have it too."""
    return (
        f"sampling: {plan.tokens['upgraded']} tokens for {plan.resolution} pixels instead of {plan.tokens['native']}, "
        f"{_gigabytes(plan.memory_bytes['inference'])}, {plan.speedup_with_decoding['upgraded']:.2f} times fewer "
        f"operations an image (transformer {plan.speedup['upgraded']:.2f})"
    )


def notes(plan: Plan) -> list[str]:
    """The assumptions behind the figures, what does not fit, and first a pipeline that cannot be trained."""
    lines = [] if plan.untrainable is None else [f"stage 2 cannot be trained: {plan.untrainable}"]
    lines.append(f"architecture: {plan.source}")
    if plan.license:
        lines.append(f"license of the base: {plan.license}; what you train from it inherits these terms")
    shares = " and ".join(f"{plan.utilisation[s]:.0%} ({s})" for s in STAGES)
    lines.append(f"hours assume {shares} of the {plan.gpu}'s peak; nothing was timed")
    for stage in ("inference", *STAGES):
        if plan.memory_bytes[stage] > plan.gpu_memory_bytes:
            lines.append(
                f"{stage} does not fit one {plan.gpu} of {_gigabytes(plan.gpu_memory_bytes)}: "
                f"{_gigabytes(plan.memory_bytes[stage])}"
                + ("" if stage == "inference" else "; a smaller batch_size with more gradient_accumulation helps")
            )
    return lines


def tables(plan: Plan) -> list[Table]:
    """The plan as tables: what an image costs, memory, training."""
    image = Table("", *VARIANTS, title=f"{plan.base}: {plan.resolution} pixels, scale {plan.scale}")
    shown = {v: plan.resolution // plan.scale if v == "base" else plan.resolution for v in VARIANTS}
    image.add_row("pixels per side", *[str(shown[v]) for v in VARIANTS])
    channels = {v: plan.base_channels + plan.detail_channels * (v == "upgraded") for v in VARIANTS}
    image.add_row("latent", *[f"f{plan.compression[v]} c{channels[v]}" for v in VARIANTS])
    image.add_row("image tokens", *[str(plan.tokens[v]) for v in VARIANTS])
    image.add_row(
        f"TFLOP per step ({plan.passes} pass{'es' if plan.passes > 1 else ''}, {plan.text_tokens} text tokens)",
        *[_tera(plan.flops_per_step[v]) for v in VARIANTS],
    )
    image.add_row(f"TFLOP per image ({plan.steps} steps)", *[_tera(plan.flops_per_image[v]) for v in VARIANTS])
    image.add_row("+ decoding, TFLOP", *[_tera(plan.decode_flops[v]) for v in VARIANTS])
    image.add_row("+ text encoding, TFLOP", *[_tera(plan.passes * plan.text_flops)] * len(VARIANTS))
    image.add_section()
    image.add_row("speed-up over native, transformer", *[f"{plan.speedup[v]:.2f}" for v in VARIANTS])
    image.add_row("with decoding and text", *[f"{plan.speedup_with_decoding[v]:.2f}" for v in VARIANTS])
    image.add_section()
    image.add_row("trained stages", *[TRAINED[v] for v in VARIANTS])

    columns = ("inference_native", "inference", *STAGES)
    titles = (f"native, batch {plan.batch}", f"upgraded, batch {plan.batch}")
    heads = [*titles, *(f"train {s}, batch {plan.runs[s]['batch_size']}" for s in STAGES)]
    memory = Table("GB", *heads, title="memory")
    parts = dict.fromkeys(part for column in columns for part in plan.memory_parts[column])
    for part in parts:
        cells = [plan.memory_parts[c].get(part) for c in columns]
        memory.add_row(part, *["" if b is None else f"{b / 1e9:.2f}" for b in cells])
    memory.add_section()
    memory.add_row("together", *[f"{plan.memory_bytes[c] / 1e9:.1f}" for c in columns])

    phases = Table("GB", "device", "main memory", "without a device", title="memory by phase, largest moment of each")
    for stage, found in plan.phases.items():
        for name, phase in found.items():
            peaks = (phase.device_bytes, phase.host_bytes, phase.together)
            phases.add_row(f"{stage}: {name}", *[f"{count / 1e9:.1f}" for count in peaks])
        phases.add_section()

    training = Table("", *STAGES, title=f"training on one {plan.gpu}")
    runs = [plan.runs[s] for s in STAGES]
    training.add_row("trainable parameters", *[f"{plan.trained_parameters[s] / 1e6:.1f}M" for s in STAGES])
    training.add_row("steps", *[f"{r['steps']:,}" for r in runs])
    training.add_row("images per step", *[str(r["batch_size"] * r["gradient_accumulation"]) for r in runs])
    training.add_row("EFLOP in all", *[f"{plan.training_flops[s] / 1e18:.3g}" for s in STAGES])
    training.add_row("hours", *[f"{plan.training_hours[s]:.3g}" for s in STAGES])
    return [image, memory, phases, training]


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
