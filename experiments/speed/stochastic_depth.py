"""What stochastic depth saves: ResNet-110 on 32 x 32 images, p = 0.5 linear. `python experiments/speed/stochastic_depth.py`.

All forms in one process, compiled first, then one burst of steps of each in turn. Expected is the mean drop rate's share of the
step: a block that is dropped with rate p costs (1 - p) of its time, the stem and the head all of theirs.
"""

import statistics
import time

from cnnfamily import benchmark, create_model, memory

BATCH, ROUNDS, STEPS = 128, 5, 2
FORMS = ("none", "example", "subset", "batch")


def main() -> None:
    programs = {}
    for form in FORMS:
        fields = {"stochastic_depth": 0.5, "stochastic_depth_form": form, "stochastic_depth_schedule": "l/L"}
        programs[form] = benchmark.training(create_model("resnet110_cifar", **fields), BATCH)
        start = time.perf_counter()
        programs[form].compile()
        print(f"{form}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
        programs[form].step()
    seconds = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form, program in programs.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                program.step()
            seconds[form].append((time.perf_counter() - start) / STEPS)
    blocks = 54
    expected = sum(0.5 * (i + 1) / blocks for i in range(blocks)) / blocks
    print(f"\nbatch {BATCH}, float32, {ROUNDS} rounds of {STEPS} steps, in turn; mean drop rate {expected:.3f}\n")
    print("| form | ms a step | of none | saving | of what is expected |\n|---|---|---|---|---|")
    for form in FORMS:
        ratios = sorted(mine / none for mine, none in zip(seconds[form], seconds["none"], strict=True))
        ratio = statistics.median(ratios)
        print(
            f"| {form} | {1e3 * statistics.median(seconds[form]):.0f} | {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
            f"| {1 - ratio:.1%} | {(1 - ratio) / expected:.2f} |"
        )


if __name__ == "__main__":
    memory.tune_malloc()
    main()
