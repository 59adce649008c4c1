"""The settings of the training algorithms: FDFO, and earlier methods on the same engine to compare it with."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fdfo_engine.config.section import Section


class _Algorithm(Section):
    """What the rest of the settings asks of any algorithm."""

    @property
    def renoises(self) -> bool:
        """Whether it looks at final images noised again: its rollout runs the model once more for each trained step."""
        return False

    @property
    def takes_churn(self) -> bool:
        """Whether `sampling.churn` is its noise on the way."""
        return False


class FdfoAlgorithm(_Algorithm):
    """Finite Difference Flow Optimization: pairs that share their noise, see METHOD."""

    name: Literal["fdfo"] = "fdfo"
    """Name of the algorithm."""

    keep_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the pairs, those with the largest reward differences, that an epoch trains on; the others count as ties
    and cost neither forward nor backward."""

    importance_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the pairs with an opinion that an epoch trains on, drawn at random: the more its gradient weighs, the
    likelier a pair is drawn, and the less it then counts, so that the expected update stays the same. 1 takes all."""

    branch_noise: Literal["independent", "antithetic"] = "independent"
    """Fresh noise of the two branches of a pair: each its own, or one noise with opposite signs."""

    advantage_scale: Literal["none", "spread"] = "none"
    """spread divides the advantages by their root mean square over the epoch's pairs; none takes rewards as is."""

    @property
    def takes_churn(self) -> bool:
        """Its own noise."""
        return True


class AblationAlgorithm(_Algorithm):
    """FDFO with three of its choices made otherwise, one by one: for finding out what its gain comes from."""

    name: Literal["ablation"]
    """Name of the algorithm."""

    states: Literal["own", "renoised"] = "own"
    """Where the model is trained: at the states that sampling went through, or at final images noised again."""

    direction: Literal["pair", "image"] = "pair"
    """What it is pulled along: half the difference of the pair's images, or its own image seen from the state."""

    pairing: Literal["one_noise", "two_noises"] = "one_noise"
    """Whether the two images of a pair start from one noise, or each from its own."""

    @property
    def renoises(self) -> bool:
        """See `_Algorithm`."""
        return self.states == "renoised"

    @property
    def takes_churn(self) -> bool:
        """As FDFO does."""
        return True


class FlowGrpoAlgorithm(_Algorithm):
    """Flow-GRPO (arXiv 2505.05470): each step of a stochastic sampler is an action, rewarded against its group."""

    name: Literal["flow_grpo"]
    """Name of the algorithm."""

    noise: float = Field(default=0.7, gt=0, le=1.4)
    """a of the sampler's noise level a * sqrt(t / (1 - t))."""

    advantage_clip: float = Field(default=5.0, gt=0)
    """Largest magnitude of an advantage, in standard deviations of the epoch's rewards."""


class AwmAlgorithm(_Algorithm):
    """Advantage Weighted Matching (arXiv 2509.25050): the final image, noised again, rewarded against its group."""

    name: Literal["awm"]
    """Name of the algorithm."""

    noise: float = Field(default=0.4, ge=0, le=1.4)
    """a of the sampler's noise level a * sqrt(t / (1 - t)); 0 samples without noise on the way."""

    advantage_clip: float = Field(default=5.0, gt=0)
    """Largest magnitude of an advantage, in standard deviations of the epoch's rewards."""

    @property
    def renoises(self) -> bool:
        """See `_Algorithm`."""
        return True


class NftAlgorithm(_Algorithm):
    """DiffusionNFT (arXiv 2509.16117) on policy: the final image, noised again, as an example for and against."""

    name: Literal["nft"]
    """Name of the algorithm."""

    noise: float = Field(default=0.0, ge=0, le=1.4)
    """a of the sampler's noise level a * sqrt(t / (1 - t)); 0 samples without noise on the way."""

    reach: float = Field(default=1.0, gt=0, le=1)
    """How far the positive and the negative velocity lie from the old one, in steps of the new one."""

    advantage_clip: float = Field(default=5.0, gt=0)
    """Advantage, in standard deviations of the epoch's rewards, at which an image counts as an example of one kind."""

    @property
    def renoises(self) -> bool:
        """See `_Algorithm`."""
        return True


def _name(value: Any) -> str | None:
    """The tag of an algorithm section: `fdfo` where none is given."""
    found = value.get("name", "fdfo") if isinstance(value, dict) else getattr(value, "name", None)
    return found if isinstance(found, str) else None


AlgorithmConfig = Annotated[
    Annotated[FdfoAlgorithm, Tag("fdfo")]
    | Annotated[FlowGrpoAlgorithm, Tag("flow_grpo")]
    | Annotated[AwmAlgorithm, Tag("awm")]
    | Annotated[NftAlgorithm, Tag("nft")]
    | Annotated[AblationAlgorithm, Tag("ablation")],
    Discriminator(_name),
]
