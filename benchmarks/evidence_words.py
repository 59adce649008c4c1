"""The paragraphs of `docs/EVIDENCE.md` that hold no number from a results file; for `benchmarks.evidence_page`."""

HEAD = """# FDFO beside earlier methods, on one engine

Written by `python -m benchmarks.evidence_page` from the files of
[benchmarks/results/evidence](../benchmarks/results/evidence); what the methods are, and where they differ from what
was published, is in [ALGORITHMS.md](ALGORITHMS.md). All on the bundled shapes miniature, whose judge is a program
that looks at pixels: evidence of how the methods learn, not of how SD3.5 looks.
"""

VARIANCE = """## Variance of the update, at the bundled base

The whole gradient, all trained items, batches of different prompts and noise; `scaled` is each weight's gradient over
its root mean square, as AdamW scales it, and `as it is` is dominated by few weights. Larger is better; in brackets 90 %
intervals. One that holds 0 means that these batches were too small or too few to show any agreement. What a method
agrees on need not be what raises the reward.
"""

COUNTING = """## A second task: counting

The same miniature on the captions with several objects, rewarded by another program: as many separate coloured spots as
the caption has objects. It looks at neither colour nor shape, and has quirks of its own (spots that touch are one).
Such a reward has few values, and the base is right most of the time: two images of one noise often score alike, and a
tied pair teaches FDFO nothing, which is why it needs so few evaluations here and gains so little. In a group of eight
one image that differs is enough.
"""

OPTIONS = """## What each option of FDFO changes

Against FDFO of the same seeds: median, least and largest. `keep_*`: `algorithm.keep_share`, of the pairs by the
difference of their rewards. `churn_*`: its weight. `stratified`: `update.subset`. `two_pairs_a_prompt`:
`sampling.pairs_per_prompt`. `spread`: `algorithm.advantage_scale`. `antithetic`: `algorithm.branch_noise`.
`importance_half`: `algorithm.importance_share`. `every_step` trains all 8 steps of an image instead of 4;
`four_updates` has as many optimizer steps an epoch instead of 2; `clip_*`: `update.clip_range`, otherwise 0.1;
`published_update` is all three as the paper has them (8 of 8 steps, 4 updates, clip range 0.03), at this learning rate
and at 6e-05.
"""

PUBLISHED = """### FDFO as published, and the settings of the miniature

`configs/shapes.yaml` trains half of the steps, in two updates an epoch, with a clip range of 0.1: `fdfo` in all tables.
What that is worth against the update of the paper, which stays the default for Stable Diffusion 3.5 (median, least and
largest difference of the seeds; bold where all of at least three agree):
"""

EFFECTS = """What one choice does, over both ways to make the other two; median, least and largest of the seeds:
"""

METHOD = """## How it was measured

One engine, model, grid (8 steps, 4 of them trained), optimizer and reward for all; groups of 8 images for the methods
that use groups, equal images an epoch. Held-out: 64 captions that were never trained on, 4 seeds each, without churn,
of the raw weights. A network evaluation is one image at one step; a backward counts as two more. Learning rates are
chosen on training prompts among three, on one seed that no final run has, by the mean training reward of the last ten
of twenty epochs; every trial that was run is listed. Noise, clip range and group size were not tuned, for any method:
FDFO's are those of `configs/shapes.yaml`, the others' are published ones. Seconds are those of one thread on a machine
that other work shared: compare them with care, evaluations are exact.

Of the variance: the scaled figure was added after a first look at the unscaled one of fdfo and flow_grpo, and 50
batches were asked of these two after the first ten; so far only fdfo's are all there. Intervals are over random halves
of the batches; with ten batches they are rough.

```bash
python -m benchmarks.variance                # agreement of batches; goes on where it was killed
python -m benchmarks.convergence             # tuning, five seeds, options; trial by trial, goes on where it was killed
python -m benchmarks.convergence --task counting --stage tune final
python -m benchmarks.convergence --task grid --stage final
python -m benchmarks.evidence_page           # this page
```
"""

READY = """## Stable Diffusion 3.5 Medium: ready, not measured

`python -m benchmarks.convergence --task sd35m --stage tune final --seeds 0 1` on a GPU: `configs/sd35m_fast.yaml` for
all, groups of 24, PickScore, held-out lines of the prompt set `starter`. To hold it against, what the paper reports of
training on PickScore at 40 steps (smoothed training reward, arXiv 2603.12893):

| epoch | FDFO | Flow-GRPO |
| --- | --- | --- |
| 0 | 0.201 | 0.202 |
| 50 | 0.222 | 0.210 |
| 100 | 0.227 | 0.215 |
| 500 | 0.230 | 0.223 |
| 1000 | 0.227 | 0.225 |
"""

NOT_MEASURED = """## Not measured

SD3.5-Medium or any other real model; DreamSim or Vendi diversity; best-of-N branches of one noise and the true reward
gradient (not built: rewards are black boxes here); the hinge on the velocity (here FDFO's velocities do not grow); KL
terms; published batch sizes; the other methods with the options that are FDFO's (every step trained, more updates).
Guidance is 1 throughout, which is none of the settings Flow-GRPO was published with.
"""
