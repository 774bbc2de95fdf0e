"""What ``evaluate`` and ``compare`` do with a model of summaries: load, write, score."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tli_engine.cli._base import check_base
from tli_engine.cli.console import progress, say
from tli_engine.config import RunConfig
from tli_engine.data.examples import ExampleTokenizer
from tli_engine.data.texts import Article
from tli_engine.evaluate.summaries import Written, write_summaries
from tli_engine.models.adapters import adapters_off
from tli_engine.models.causal import CausalModel
from tli_engine.models.files import ModelFiles, open_model
from tli_engine.models.generate import GenerateOptions
from tli_engine.models.peft_format import load_adapter
from tli_engine.train.sft_prepare import fuse_for_texts, load_whole


def stages(
    folder: Path, config: RunConfig, base: ModelFiles, device: str | None = None
) -> Iterator[tuple[str, CausalModel]]:
    """The base model as ``before``, then the trained one as ``after``.

    Whoever asks for the second must have let go of the first: of full fine-tuning there are two, and
    only one is held.

    Raises:
        UserError: The base model is not the one that the run began with.
    """
    model = load_whole(base, config, device)
    check_base(folder, config, model.early.base_digest)
    if config.method == "full":
        fuse_for_texts(model, config)
        yield "before", model
        del model
        trained = load_whole(open_model(str(folder / "model")), config, device)
        fuse_for_texts(trained, config)
        yield "after", trained
        return
    load_adapter(model.early, folder / "adapter")
    fuse_for_texts(model, config)
    with adapters_off(model.early):
        yield "before", model
    yield "after", model


@dataclass(frozen=True)
class Summariser:
    """Lets models summarise the same articles.

    Attributes:
        prompts: Tokens of each article's, which is cut so that the answer fits the context too.
        tokenizer: Of the models.
        examples: Makes the prompts.
        options: Of generation.
    """

    prompts: Sequence[tuple[int, ...]]
    tokenizer: Any
    examples: ExampleTokenizer
    options: GenerateOptions

    @classmethod
    def prepare(
        cls,
        articles: Sequence[Article],
        base: ModelFiles,
        config: RunConfig,
        max_new_tokens: int,
        **how: Any,
    ) -> "Summariser":
        """For the models of a run; ``how`` are :class:`GenerateOptions`, the end left out.

        Raises:
            UserError: So many new tokens leave no room for an article.
        """
        examples = ExampleTokenizer(base.tokenizer, config.prompt, config.sft.context)
        # one that was not trained ends as its authors made it end
        eos_token_ids = tuple(dict.fromkeys((examples.end, *base.eos_token_ids)))
        options = GenerateOptions(max_new_tokens, eos_token_ids, **how)
        prompts = [examples.prompt_ids(article, max_new_tokens) for article in articles]
        return cls(prompts, base.tokenizer, examples, options)

    def write(self, model: CausalModel, title: str) -> Written:
        """Summaries of all articles, with progress."""
        with progress(title, len(self.prompts)) as advance:
            written = write_summaries(model, self.tokenizer, self.prompts, self.options, advance)
        figures = written.to_json()
        say(
            f"{title}: {len(written.summaries)} articles, {written.tokens} tokens in "
            f"{written.seconds:.1f} s ({figures['tokens_per_s']:.0f} tokens/s)"
        )
        return written
