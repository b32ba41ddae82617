"""How fast scenes are made, and what each mode looks like: `python benchmarks/scenes.py`.

Prints seconds for 2,000 scenes of 96 pixels on one thread, and draws benchmarks/scenes.png: one row for
each mode with boxes, and under every picture the caption that the annotations give.
"""

import textwrap
import time
from pathlib import Path

import matplotlib.pyplot as plt

from reattend.data.scene_language import caption
from reattend.data.scenes import MODES, make_scenes
from reattend.plots import COLOURS, save_png

SCENES = 2_000
COLUMNS = 4


def main() -> None:
    make_scenes(1, "single")  # reads the cut-outs
    for mode in ("single", "several"):
        started = time.perf_counter()
        make_scenes(SCENES, mode)
        print(f"{SCENES} scenes, {mode}: {time.perf_counter() - started:.1f} s")
    figure, axes = plt.subplots(len(MODES), COLUMNS, figsize=(5.2, 8.4))
    for row, mode in zip(axes, MODES, strict=True):
        video = MODES[mode].frames > 1
        scenes = make_scenes(1 if video else COLUMNS, mode, split="test", seed=5)
        row[0].set_title(mode.replace("_", " "), loc="left")
        for column, axis in enumerate(row):
            scene, frame = (0, 1 + column) if video else (column, None)
            pixels, boxes = scenes.pixels[scene], scenes.boxes[scene]
            if video:
                pixels, boxes = pixels[frame], boxes[frame]
            axis.imshow(pixels.permute(1, 2, 0))
            for x0, y0, x1, y1 in boxes.tolist():
                box = plt.Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False)
                box.set(edgecolor=COLOURS[1], linewidth=1)
                axis.add_patch(box)
            words = f"frame {frame + 1}" if video and column else caption(scenes, scene)
            axis.set_xlabel("\n".join(textwrap.wrap(words, 24)[:4]), fontsize=5)
            axis.set(xticks=[], yticks=[])
    save_png(figure, Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
