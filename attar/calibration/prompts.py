"""Calibration prompts for models that bring none of their own."""

from __future__ import annotations

GENERAL_PROMPTS = (
    "a red fox trots through fresh snow at the edge of a pine forest, morning light",
    "waves roll onto a black sand beach under heavy clouds, slow camera pan",
    "a street musician plays the violin at night, neon signs reflected in puddles",
    "close-up of hands kneading bread dough on a floured wooden table",
    "an old steam train crosses a stone viaduct in a green valley, aerial view",
    "a child in a yellow raincoat jumps into a puddle, slow motion",
    "a hummingbird hovers in front of an orange flower, shallow depth of field",
    "a crowded market in the rain seen from above, umbrellas moving",
    "an astronaut walks along a red canyon, dust drifting in low gravity",
    "a cat stretches on a windowsill while snow falls outside",
    "time-lapse of clouds over a mountain lake at sunset",
    "a potter shapes a tall vase on a spinning wheel, warm studio light",
    "a sailing boat heels in strong wind, spray over the bow",
    "cherry blossoms fall onto a quiet canal, a small boat passes by",
    "a robot arm assembles a wristwatch in a bright laboratory, macro shot",
    "two dancers turn under a single spotlight on an empty stage",
)
