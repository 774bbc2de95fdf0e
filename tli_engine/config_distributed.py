"""What several processes of a run share, and how: the section ``distributed`` of a run."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class DistributedConfig(BaseModel):
    """Several GPUs: how the frozen weights lie on them, and how long they wait for one another.

    How many there are is said where the run is started, and is no part of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # of fine-tuning with adapters: all NF4 weights on each GPU, or a share of their bytes
    weights: Literal["replicated", "sharded"] = "replicated"
    # of full fine-tuning: parameters, gradients and optimizer states in the host's memory
    offload: bool = False
    # seconds after which waiting for another process ends the run
    timeout: Annotated[float, Field(gt=0)] = 600
