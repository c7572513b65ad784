"""Pass, PassManager, textual pipelines and the instruments that watch each step."""

from xopt.pipeline.base import Between, Choice, Effect, Pass, PassReport, Refusal
from xopt.pipeline.context import PassContext

__all__ = ["Between", "Choice", "Effect", "Pass", "PassContext", "PassReport", "Refusal"]
