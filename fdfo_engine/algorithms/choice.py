"""From the settings to the algorithm they name."""

from fdfo_engine.algorithms.ablation import Ablation
from fdfo_engine.algorithms.awm import Awm
from fdfo_engine.algorithms.fdfo import Fdfo
from fdfo_engine.algorithms.flow_grpo import FlowGrpo
from fdfo_engine.algorithms.nft import Nft
from fdfo_engine.algorithms.renoised_images import renoised_plan, steps_to_train
from fdfo_engine.config import AblationAlgorithm, AwmAlgorithm, Config, FdfoAlgorithm, FlowGrpoAlgorithm, NftAlgorithm
from fdfo_engine.update.algorithm import Algorithm


def build_algorithm(config: Config, backend: str) -> Algorithm:
    """The algorithm of `config`; `backend` runs its ops (`ops.backend_for`)."""
    match config.algorithm:
        case FdfoAlgorithm():
            return Fdfo(config.algorithm, config.sampling.churn, config.run.seed, backend)
        case FlowGrpoAlgorithm():
            return FlowGrpo(config.algorithm, backend)
        case AwmAlgorithm():
            return Awm(config.algorithm, renoised_plan(config, config.algorithm.noise), backend)
        case NftAlgorithm():
            return Nft(config.algorithm, renoised_plan(config, config.algorithm.noise), backend)
        case AblationAlgorithm():
            sampling, seed = config.sampling, config.run.seed
            return Ablation(config.algorithm, sampling.churn, seed, steps_to_train(config), backend)
