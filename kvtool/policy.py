"""What the runtime keeps exact, whatever the method."""

from pydantic import BaseModel, ConfigDict, Field


class CachePolicy(BaseModel):
    """Tokens and layers that are never compressed: counted in every figure.

    sinks: first tokens. window: most recent tokens. exact_layers: layers left alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sinks: int = Field(4, ge=0)
    window: int = Field(128, ge=0)
    exact_layers: tuple[int, ...] = ()
