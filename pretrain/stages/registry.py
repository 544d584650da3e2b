"""From a recipe's `stage` to the class that trains it."""

from pretrain.config import RunConfig
from pretrain.stages.base import BaseStage
from pretrain.stages.contract import Stage
from pretrain.stages.idm import IdmStage, VqIdmStage
from pretrain.stages.policy import PolicyStage


def stage_class(config: RunConfig) -> type[Stage]:
    """The stage of `config`."""
    if config.stage == "idm":
        return VqIdmStage if config.actions.assignment == "vq" else IdmStage
    return {"base": BaseStage, "policy": PolicyStage}[config.stage]
