"""What the queue's operations do to the engine: on every rank the same, and the same again when they are replayed."""

from __future__ import annotations

import hashlib
import hmac
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdfo_engine.engine import Engine
from fdfo_engine.evaluation import evaluation_list
from fdfo_engine.rewards import WeightedRewards, labelled
from fdfo_engine.rewards.person import PERSON
from fdfo_engine.rollout.prompts import PromptList
from fdfo_engine.runtime.checkpoint import checkpoint_name
from fdfo_engine.runtime.distributed import all_gather_rows, is_main, on_main, together
from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.runtime.events import Metrics
from fdfo_engine.runtime.picture import save_png, to_picture
from fdfo_engine.runtime.run_events import Told
from fdfo_engine.runtime.run_folder import checkpoint_store
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.rounds import COMPARISON_OPERATION, MAX_PROMPTS, StoredPair
from fdfo_engine.serve.weights import BASE, RUN, weights_named
from fdfo_engine.trajectory import Rollout

SERVE_FOLDER = "serve"
COMPARED_PAIRS = 1 << 40
"""Pairs of comparisons are counted from here: no run samples so many of its own."""
Result = dict[str, Any]


class Commands:
    """One method an operation. Every method is collective and returns on every rank what the client is told.

    Attributes:
        engine: what they work on.
        trained_versions: of each round in the middle of its training, the weights it last moved; belongs to a
            checkpoint, since a rollout that is read again from disk has forgotten it.
    """

    def __init__(self, engine: Engine, prompts: PromptList, rewards: WeightedRewards, secret: str, told: Told) -> None:
        self.engine, self._prompts, self._rewards, self._secret = engine, prompts, rewards, secret
        self._told = told
        self._answers: list[dict[str, float]] = []
        self._rollouts: dict[str, Rollout] = {}
        self.trained_versions: dict[str, int] = {}
        self.folder = Path(engine.config.run.dir) / SERVE_FOLDER

    def run(self, kind: str, body: Mapping[str, Any], number: int) -> Result:
        """Carries out operation `number`."""
        methods: dict[str, Callable[..., Result]] = {
            "sample": self.sample,
            "compute_reward": self.compute_reward,
            "forward": self.forward,
            "forward_backward": self.forward_backward,
            "optim_step": self.optim_step,
            "snapshot": self.snapshot,
            "save_state": self.save_state,
            "load_state": self.load_state,
            "train": self.train,
            "generate": self.generate,
            "export": self.export,
            COMPARISON_OPERATION: self.compare,
            "checkpoint": self.save_state,
        }
        return methods[kind](body, number)

    # rounds

    def sample(self, body: Mapping[str, Any], number: int) -> Result:
        """Samples round `r{number}`; where it was sampled before, it is only counted."""
        name, engine = f"r{number}", self.engine
        texts = self._texts(body)
        of = body["keep"]["of"] if body.get("keep") else 1
        if self._is_kept(name):
            rollout = self.rollout(name)
            engine.next_pair = rollout.first_pair + of * len(texts)
        else:
            rollout = engine.rollout([text for text in texts for _ in range(of)])
            rollout = self._most_distant(rollout, len(texts), of)
            together(lambda: self._save_images(rollout.pair_ids, rollout.images))
            self._keep(name, rollout)
        distances = all_gather_rows(rollout.distance).tolist()
        ids = rollout.kept or list(range(rollout.first_pair, rollout.first_pair + rollout.num_pairs))
        pairs = [
            StoredPair(pair, texts[(pair - rollout.first_pair) // of], distance, self._image_ids(pair))
            for pair, distance in zip(ids, distances, strict=True)
        ]
        return {
            "round": name,
            "first_pair": rollout.first_pair,
            "sampled": of * len(texts),
            "epoch": engine.epoch,
            "weights_version": rollout.weights_version,
            "pairs": [
                {"pair_id": p.pair, "prompt": p.prompt, "images": list(p.images), "distance": p.distance} for p in pairs
            ],
        }

    def compare(self, body: Mapping[str, Any], number: int) -> Result:
        """Images of held-out prompts, by the untrained model (branch 0) and by the trained one: round `c{number}`."""
        engine, seed = self.engine, body["seed"]
        prompts = evaluation_list(engine.config).of_pairs(range(body["count"]))
        drawn = [engine.generate(prompts, seed=seed, weights=weights_named(engine, model)) for model in (BASE, RUN)]
        first = COMPARED_PAIRS + number * MAX_PROMPTS
        ids = range(first, first + len(prompts))
        on_main(lambda: self._save_images(ids, torch.stack(drawn, 1)))
        return {
            "round": f"c{number}",
            "first_pair": first,
            "sampled": len(prompts),
            "epoch": engine.epoch,
            "weights_version": engine.weights_version,
            "pairs": [
                {"pair_id": pair, "prompt": prompt, "images": list(self._image_ids(pair)), "distance": 0.0}
                for pair, prompt in zip(ids, prompts, strict=True)
            ],
        }

    def _texts(self, body: Mapping[str, Any]) -> list[str]:
        """One a pair that the round shows."""
        prompts = body.get("prompts")
        if prompts is None:
            count, first = body.get("count") or self.engine.config.sampling.pairs_per_epoch, self.engine.next_pair
            prompts = self._prompts.of_pairs(range(first, first + count))
        return [prompt for prompt in prompts for _ in range(body.get("copies", 1))]

    def _most_distant(self, rollout: Rollout, count: int, of: int) -> Rollout:
        """Of each prompt's `of` neighbouring pairs the one whose latents ended furthest apart."""
        if of == 1:
            return rollout
        best = all_gather_rows(rollout.distance).view(count, of).argmax(1)
        return rollout.keep([rollout.first_pair + row * of + int(choice) for row, choice in enumerate(best)])

    def _save_images(self, pairs: Sequence[int], images_PK: Tensor) -> None:
        folder = self.folder / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for pair, images in zip(pairs, images_PK, strict=True):
            for image, picture in zip(self._image_ids(pair), images, strict=True):
                save_png(to_picture(picture), folder / f"{image}.png")

    def _image_ids(self, pair: int) -> tuple[str, str]:
        """Nobody without the server's secret can tell from an id which branch it is."""
        first, second = (
            hmac.new(self._secret.encode(), f"{pair}:{branch}".encode(), hashlib.sha256).hexdigest()[:32]
            for branch in range(2)
        )
        return first, second

    def _keep(self, name: str, rollout: Rollout) -> None:
        """On disk under its final name once it is whole: a person may take a day over it."""
        final = self._round_folder(name)
        partial = final.with_name(f"{name}.partial")
        on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        together(lambda: rollout.save(partial))
        on_main(lambda: partial.rename(final))
        self._rollouts = {name: rollout}

    def _is_kept(self, name: str) -> bool:
        return self._round_folder(name).is_dir()

    def _round_folder(self, name: str) -> Path:
        return self.folder / "rounds" / name

    def rollout(self, name: str) -> Rollout:
        """The trajectories of a round.

        Raises:
            Problem: they are gone, since the round was trained on.
        """
        if name not in self._rollouts:
            if not self._round_folder(name).is_dir():
                raise Problem(410, "round_gone", f"round {name}: its trajectories are gone, since it was trained on")
            rollout = together(lambda: Rollout.load(self._round_folder(name), self.engine.device))
            rollout.trained_version = self.trained_versions.get(name)
            self._rollouts = {name: rollout}
        return self._rollouts[name]

    def train(self, body: Mapping[str, Any], number: int) -> Result:
        """`Engine.update` on a round, with `rewards` by pair id that the queue made of its feedback."""
        rollout = self.rollout(body["round"])
        table_PK = self._mixed(rollout, self._table(rollout, body["rewards"]))
        metrics = self.engine.update(rollout, table_PK)
        self._record(rewards_record(rollout, table_PK) | metrics)
        self._forget(body["round"])
        return self._saved(number, {"round": body["round"], "metrics": metrics})

    def _mixed(self, rollout: Rollout, chosen_PK: Tensor) -> Tensor:
        """Where `person` is one of the run's rewards, its others are added to what people chose, as weighted."""
        persons = [name for name, part in labelled(self.engine.config.rewards).items() if part.name == PERSON]
        if not persons:
            return chosen_PK
        automatic = self._rewards.without(persons)
        parts_PK = self._scored(rollout, automatic) if automatic.rewards else {}
        return self._rewards.combined(parts_PK | dict.fromkeys(persons, chosen_PK))

    def _scored(self, rollout: Rollout, rewards: WeightedRewards) -> dict[str, Tensor]:
        """Each reward's scores of all pairs of a round."""
        on_main(rewards.require_ready)
        prompts = [prompt for prompt in rollout.prompts for _ in range(2)]
        own = together(lambda: rewards(prompts, rollout.images.flatten(0, 1)))
        return {name: all_gather_rows(scores.view(-1, 2)) for name, scores in own.items()}

    # primitives

    def compute_reward(self, body: Mapping[str, Any], _number: int) -> Result:
        """The run's own rewards of a round's images: of each pair its sum, and every part."""
        rollout = self.rollout(body["round"])
        parts_PK = self._scored(rollout, self._rewards)
        total_PK = self._rewards.combined(parts_PK)
        ids = self._pair_ids(rollout)
        return {
            "rewards": _by_pair(ids, total_PK),
            "parts": {name: _by_pair(ids, part_PK) for name, part_PK in parts_PK.items()},
        }

    def forward(self, body: Mapping[str, Any], _number: int) -> Result:
        """See `Primitives.forward`."""
        rollout = self.rollout(body["round"])
        found = self.engine.primitives.forward(rollout, part=body["part"], parts=body.get("parts"))
        ids = self._pair_ids(rollout)
        return {"log_ratios": _by_pair(ids, found.values), "steps": _by_pair(ids, found.steps)}

    def forward_backward(self, body: Mapping[str, Any], _number: int) -> Result:
        """See `Primitives.forward_backward`."""
        rollout = self.rollout(body["round"])
        given = {
            name: self._table(rollout, body[name]) for name in ("rewards", "advantages", "weights") if body.get(name)
        }
        if not given:  # an empty table: no opinion at all
            given = {"advantages": torch.zeros(rollout.num_pairs, 2)}
        answer = self.engine.primitives.forward_backward(
            rollout,
            **given,
            clip_range=body["loss_config"].get("clip_range"),
            part=body["part"],
            parts=body.get("parts"),
            more=body["more"],
            allow_stale=body["allow_stale"],
        )
        self._answers.append(answer)
        return dict(answer)

    def optim_step(self, body: Mapping[str, Any], _number: int) -> Result:
        """See `Primitives.optim_step`."""
        step = self.engine.primitives.optim_step(body.get("lr"))
        for name, rollout in self._rollouts.items():
            if rollout.trained_version is not None:
                self.trained_versions[name] = rollout.trained_version
        return {
            "grad_norm": step.grad_norm,
            "applied": step.applied,
            "left_out": step.left_out,
            "weights_version": self.engine.weights_version,
        }

    def snapshot(self, _body: Mapping[str, Any], number: int) -> Result:
        """Ends an epoch and keeps its checkpoint."""
        self.engine.end_epoch()
        self._record(_means(self._answers))
        return self._saved(number, {"weights_version": self.engine.weights_version})

    def save_state(self, _body: Mapping[str, Any], number: int) -> Result:
        """Keeps a checkpoint."""
        return self._saved(number, {})

    def load_state(self, body: Mapping[str, Any], number: int) -> Result:
        """Goes on from the weights of checkpoint `name`; epochs and pairs are counted on, since neither restarts."""
        engine = self.engine
        epoch, next_pair = engine.epoch, engine.next_pair
        if not engine.load(body["name"], strict=True):
            raise UsageError(f"load_state: no checkpoint {body['name']}")
        engine.epoch, engine.next_pair = epoch + 1, next_pair
        self._rollouts, self.trained_versions = {}, {}
        return self._saved(number, {"restored": body["name"], "weights_version": engine.weights_version})

    # images and exports

    def generate(self, body: Mapping[str, Any], number: int) -> Result:
        """Images of one prompt without churn, as PNG files of the run folder."""
        prompts = [body["prompt"]] * (body.get("n") or 1)
        weights = weights_named(self.engine, body["model"])
        images = self.engine.generate(
            prompts,
            seed=body["seed"],
            steps=body.get("num_inference_steps"),
            guidance_scale=body.get("guidance_scale"),
            weights=weights,
        )
        names = [
            hmac.new(self._secret.encode(), f"generated:{number}:{i}".encode(), hashlib.sha256).hexdigest()[:32]
            for i in range(len(images))
        ]
        on_main(lambda: self._write_generated(names, images))
        return {"images": names}

    def _write_generated(self, names: Sequence[str], images: Tensor) -> None:
        folder = self.folder / "generated"
        folder.mkdir(parents=True, exist_ok=True)
        for name, image in zip(names, images, strict=True):
            save_png(to_picture(image), folder / f"{name}.png")

    def export(self, body: Mapping[str, Any], number: int) -> Result:
        """Writes the export under `serve/exports/`."""
        folder = self.folder / "exports" / f"export_{number}"
        self.engine.export(folder, weights=body["weights"], style=body["style"], overwrite=True)
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return {"operation": number, "folder": str(folder.resolve()), "files": files}

    # parts

    def _saved(self, number: int, result: Result) -> Result:
        """`result` with the checkpoint that holds it, and the operation that it came from.

        A disk that is full does not undo what was trained: the answer says that no checkpoint was kept.
        """
        engine = self.engine
        result = {"epoch": engine.epoch, "checkpoint": checkpoint_name(engine.epoch), **result}
        if result["checkpoint"] in checkpoint_store(engine.config.run.dir).names():
            return result
        engine.notes = {"operation": number, "result": result, "trained_versions": self.trained_versions}
        try:
            engine.save()
        except CheckpointError as error:
            return result | {"checkpoint": None, "warning": f"no checkpoint was kept: {error}"}
        return result

    def _record(self, numbers: Mapping[str, float]) -> None:
        """Tells the epoch that has just ended: a line of metrics.jsonl."""
        epoch = self.engine.epoch
        values = {"epoch": epoch, "lr": self.engine.config.optimizer.lr, **numbers}
        self._told.tell(Metrics(epoch=epoch, kind="epoch", values=values))
        self._answers = []

    def _forget(self, name: str) -> None:
        self._rollouts.pop(name, None)
        self.trained_versions.pop(name, None)

    def discard_round(self, name: str) -> None:
        """Deletes the trajectories of a round that was trained on."""
        if is_main():
            shutil.rmtree(self._round_folder(name), ignore_errors=True)

    def _pair_ids(self, rollout: Rollout) -> list[int]:
        return rollout.kept or list(range(rollout.first_pair, rollout.first_pair + rollout.num_pairs))

    def _table(self, rollout: Rollout, by_pair: Mapping[str, Any]) -> Tensor:
        """`[P, 2, ...]` of what a client gave by pair id; a pair that is left out has NaN, or weights of 0."""
        ids = self._pair_ids(rollout)
        known = {str(pair) for pair in ids}
        if foreign := [pair for pair in by_pair if pair not in known]:
            raise Problem(422, "invalid", f"pair {foreign[0]}: the round has no such pair")
        return _filled([by_pair.get(str(pair)) for pair in ids])


def _filled(rows: Sequence[Any]) -> Tensor:
    """A table of what was given for each pair: a number for each branch, or weights; None is no opinion."""
    example = next(row for row in rows if row is not None)
    is_weights = isinstance(example[0], list)
    blank = [[0.0] * len(branch) for branch in example] if is_weights else [None, None]
    numbers = [[_numbers(branch) for branch in (blank if row is None else row)] for row in rows]
    try:
        table = torch.tensor(numbers, dtype=torch.float64)
    except ValueError as error:
        raise Problem(422, "invalid", "weights: takes as many numbers for each branch of each pair") from error
    return table if is_weights else table.squeeze(2)


def _numbers(of_branch: Any) -> list[float]:
    """NaN for None."""
    given = of_branch if isinstance(of_branch, list) else [of_branch]
    return [float("nan") if number is None else number for number in given]


def _by_pair(ids: Sequence[int], table_PK: Tensor) -> dict[str, Any]:
    return {str(pair): row.tolist() for pair, row in zip(ids, table_PK, strict=True)}


def rewards_record(rollout: Rollout, table_PK: Tensor) -> dict[str, float]:
    """What metrics.jsonl says of an epoch's rewards."""
    known = table_PK[torch.isfinite(table_PK)]
    return {
        "first_pair": rollout.first_pair,
        "pairs": rollout.num_pairs,
        "reward_mean": float(known.mean()),
        "reward_std": float(known.std(correction=0)),
    }


def _means(answers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of what each `forward_backward` of an epoch answered; empty without any."""
    names = answers[0] if answers else {}
    return {name: sum(answer[name] for answer in answers) / len(answers) for name in names}
