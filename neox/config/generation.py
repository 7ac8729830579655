"""Text generation and evaluation."""

from typing import Literal

from neox.config.keys import Affix, Float, Int, Key, Section, Strings, Text, setting


class GenerationConfig(Section):
    """How text is sampled."""

    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] | None = setting(
        None,
        "Where prompts come from; absent: sample_input_file if given, else none. precompute generates nothing: it "
        "writes the log-probabilities of the data that dpo and kto compare with.",
        rule="Absent: input-file when sample_input_file is set, else unconditional. precompute needs "
        "precompute_model_name.",
    )
    temperature: Float = setting(
        0.0, "Temperature; 0 takes the likeliest token.", ge=0, rule="0 ignores top_k and top_p."
    )
    top_p: Float = setting(0.0, "Nucleus that tokens are drawn from; 0 is off.", ge=0, le=1)
    top_k: Int = setting(0, "Number of likeliest tokens to draw from; 0 is off.", ge=0)
    return_logits: bool = setting(False, "Write the logits too.")
    maximum_tokens: Int = setting(64, "New tokens of one prompt.", gt=0)
    prompt_end: str = setting("\n", "What ends a prompt in an interactive session.")
    sample_input_file: Text | None = setting(None, "Prompts, one a line.", rule="For text_gen_type input-file.")
    sample_output_file: Text = setting("samples.txt", "JSON lines of the results.")
    num_samples: Int = setting(1, "Number of unconditional samples.", gt=0, rule="For text_gen_type unconditional.")
    recompute: bool = setting(False, "Generate without a cache of keys and values.")
    precompute_model_name: Text | None = setting(
        None,
        "Name of the model whose log-probabilities are written to, or read from, <data path>_<name>.",
        rule="Read by dpo and kto in place of a reference model.",
    )


class EvaluationConfig(Section):
    """Which tasks are evaluated."""

    eval_tasks: Strings | None = setting(None, "Tasks of lm-evaluation-harness.")
    eval_results_prefix: Affix = setting("", "Prefix of the results file.")


OTHER_KEYS: tuple[Key, ...] = ()
