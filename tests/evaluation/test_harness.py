"""lm-evaluation-harness on a small model: scores against direct computation, and whole tasks from local files."""

import json
import os
import shutil
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from inference.small_model import SMALL, naive_greedy, save_small, small_config, small_model
from ranks import free_port, run_ranks
from scripts_of import fork_script

from neox.data.tokenizers import CharLevelTokenizer
from neox.errors import UserError
from neox.evaluation.harness import require_harness
from neox.evaluation.run import evaluate_model, result_path, run_evaluation, say_what_was_changed
from neox.evaluation.tasks import find_tasks
from neox.inference.loading import load_model
from neox.inference.session import join
from neox.launch.environment import detect
from neox.model.build import SINGLE
from neox.model.layers import Decoder
from neox.model.loss import token_losses

# Before the harness is imported: nothing in these tests may need a network.
os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

ROOT = Path(__file__).parents[2]
TOKENIZER = CharLevelTokenizer()
QUIZ = [
    {"question": f"What is {a} plus {b}?", "choices": [str(a + b), str(a * b + 1), "twelve"], "answer": (a + b) % 3}
    for a in range(4)
    for b in range(4)
]
TEXTS = [{"text": f"Line {i}: " + "the quick brown fox " * (i % 6)} for i in range(13)]


@pytest.fixture(scope="module")
def adapter() -> Any:
    require_harness()
    from neox.evaluation.adapter import HarnessModel

    return HarnessModel(small_model(), TOKENIZER, batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice, a perplexity and a generation task on local data."""
    folder = tmp_path_factory.mktemp("tasks")
    # The folder in which the harness would keep its copy of the data.
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    for name, rows in (("quiz", QUIZ), ("texts", TEXTS)):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "dataset_path: json\ntest_split: test\nnum_fewshot: 0\n"

    def data(name: str) -> str:
        return f"dataset_kwargs:\n  data_files:\n    test: {folder / name}.json\n  cache_dir: {folder / 'cache'}\n"

    (folder / "tiny_quiz.yaml").write_text(
        f"task: tiny_quiz\noutput_type: multiple_choice\n{common}{data('quiz')}"
        'doc_to_text: "{{question}} "\ndoc_to_target: answer\ndoc_to_choice: choices\n'
        "metric_list:\n  - metric: acc\n"
    )
    (folder / "tiny_texts.yaml").write_text(
        f"task: tiny_texts\noutput_type: loglikelihood_rolling\n{common}{data('texts')}"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n"
    )
    (folder / "tiny_answers.yaml").write_text(
        f"task: tiny_answers\noutput_type: generate_until\n{common}{data('quiz')}"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        'generation_kwargs:\n  until: ["e"]\n  max_gen_toks: 8\nmetric_list:\n  - metric: exact_match\n'
    )
    return folder


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def direct(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood by one plain call of the whole model."""
    whole = torch.tensor([context + continuation])
    with torch.no_grad():
        logits = model(whole[:, :-1])[:, len(context) - 1 :]
    labels = whole[:, len(context) :]
    return -token_losses(logits, labels).sum().item(), bool((logits.argmax(-1) == labels).all())


def test_loglikelihoods_equal_direct_computation(adapter: Any) -> None:
    model, encode = small_model(), TOKENIZER.tokenize
    likeliest = TOKENIZER.detokenize(naive_greedy(model, encode("abc"), 1)[0])
    pairs = [("abc", " def"), ("a much longer context", " x"), ("", "start"), ("x ", "y"), ("abc", likeliest)]
    tokens = [
        (encode("abc"), encode(" def")),
        (encode("a much longer context"), encode(" x")),
        ([TOKENIZER.eod], encode("start")),
        # A space at the end of the context belongs to the continuation.
        (encode("x"), encode(" y")),
        (encode("abc"), encode(likeliest)),
    ]
    answers = adapter.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (score, greedy), (context, continuation) in zip(answers, tokens, strict=True):
        expected, likely = direct(model, context, continuation)
        assert score == pytest.approx(expected, abs=1e-4)
        assert greedy == likely
    assert [greedy for _, greedy in answers].count(True) >= 1


def test_a_context_that_is_too_long_keeps_its_end(adapter: Any) -> None:
    text = "0123456789" * 9
    ((score, _),) = adapter.loglikelihood(requests("loglikelihood", (text, "end")), disable_tqdm=True)
    encoded = TOKENIZER.tokenize(text)
    assert score == pytest.approx(direct(small_model(), encoded[-62:], TOKENIZER.tokenize("end"))[0], abs=1e-4)
    with pytest.raises(UserError, match="a text to score has 65 tokens and the model 64 positions"):
        adapter.loglikelihood(requests("loglikelihood", ("a", "b" * 65)), disable_tqdm=True)


def test_rolling_equals_the_sum_over_tokens(adapter: Any) -> None:
    model = small_model()
    texts = ["short", "x" * 64, "the quick brown fox " * 7, ""]
    answers = adapter.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)), True)
    for text, answer in zip(texts, answers, strict=True):
        tokens = TOKENIZER.tokenize(text)
        expected = 0.0
        for i, token in enumerate(tokens):
            # Windows of 64: the first from the end-of-document token, the later ones from a token of the one before;
            # the last window reaches back to be full.
            start = i // 64 * 64
            before = [TOKENIZER.eod, *tokens][start : i + 1]
            if start and len(tokens) < start + 64:
                before = tokens[len(tokens) - 65 : i]
            expected += direct(model, before, [token])[0]
        assert answer == pytest.approx(expected, abs=1e-3)


def test_chunks_of_logits_change_nothing(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = requests("loglikelihood", ("abc", " def ghi"), ("x", "yz"))
    whole = adapter.loglikelihood(given, disable_tqdm=True)
    monkeypatch.setattr("neox.evaluation.adapter.CHUNK_BYTES", 4 * 512 * 3)
    chunked = adapter.loglikelihood(given, disable_tqdm=True)
    assert [score for score, _ in chunked] == pytest.approx([score for score, _ in whole])
    assert [greedy for _, greedy in chunked] == [greedy for _, greedy in whole]


def test_generate_until_equals_greedy_generation_up_to_the_stop(adapter: Any) -> None:
    model, prompts = small_model(), ["hello", "a longer prompt than the first", "x"]
    whole = [TOKENIZER.detokenize(naive_greedy(model, TOKENIZER.tokenize(p), 20)[0]) for p in prompts]
    stop = next(c for c in whole[0][2:] if c in TOKENIZER.detokenize(TOKENIZER.tokenize(c)))
    for until in ([], [stop]):
        given = requests("generate_until", *((p, {"until": until, "max_gen_toks": 20}) for p in prompts))
        for text, answer in zip(whole, adapter.generate_until(given, disable_tqdm=True), strict=True):
            before_end = text.split(chr(TOKENIZER.eod))[0]
            assert answer == (before_end.split(stop)[0] if until else before_end)


def test_generation_mixes_tasks_and_keeps_the_order(adapter: Any) -> None:
    kwargs: list[dict[str, Any]] = [{"max_gen_toks": 3}, {"max_gen_toks": 6}]
    given = requests("generate_until", ("one", kwargs[0]), ("two", kwargs[1]), ("three", kwargs[0]))
    answers = adapter.generate_until(given, disable_tqdm=True)
    alone = [adapter.generate_until([request], disable_tqdm=True)[0] for request in given]
    assert answers == alone


def test_lone_surrogates_are_read_as_replacement_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from neox.evaluation.adapter import HarnessModel

    def answers(adapter: Any, high: str, low: str) -> list[Any]:
        generated = ((f"half {high}", {"until": [], "max_gen_toks": 4}),)
        return [
            adapter.loglikelihood(requests("loglikelihood", (f"half {high}", f"x{low}")), disable_tqdm=True),
            adapter.loglikelihood_rolling(requests("loglikelihood_rolling", (f"{low} y",)), disable_tqdm=True),
            adapter.generate_until(requests("generate_until", *generated), disable_tqdm=True),
        ]

    whole, broken = (HarnessModel(small_model(), TOKENIZER) for _ in range(2))
    assert answers(broken, "\ud83d", "\udc00") == answers(whole, "\ufffd", "\ufffd")
    for adapter in (whole, broken):
        say_what_was_changed(adapter)
    assert capsys.readouterr().err == (
        "eval_tasks: some requests had lone surrogates, which UTF-8 cannot hold; each was replaced by U+FFFD\n"
    )


def test_settings_of_generation_that_are_not_honoured_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    from neox.evaluation.adapter import HarnessModel

    adapter = HarnessModel(small_model(), TOKENIZER)
    plain = {"until": ["x"], "max_gen_toks": 1, "do_sample": True, "temperature": 0.5, "top_k": 3, "num_beams": 1}
    adapter.generate_until(requests("generate_until", ("a", plain)), disable_tqdm=True)
    say_what_was_changed(adapter)
    assert capsys.readouterr().err == ""
    adapter.generate_until(
        requests("generate_until", ("a", plain | {"num_beams": 10, "min_p": 0.1})), disable_tqdm=True
    )
    say_what_was_changed(adapter)
    assert "generation_kwargs of a task have min_p 0.1, num_beams 10, which is not supported" in capsys.readouterr().err


def test_a_task_that_generates_beyond_the_model_is_refused(adapter: Any) -> None:
    with pytest.raises(UserError, match="generates 64 tokens and the model has 64 positions"):
        adapter.generate_until(requests("generate_until", ("a", {"max_gen_toks": 64})), disable_tqdm=True)


def expected_scores(model: Decoder) -> dict[str, float]:
    """Accuracy of the quiz and bits per byte of the texts, by plain calls of the model."""
    right = 0
    for row in QUIZ:
        context = TOKENIZER.tokenize(str(row["question"]))
        choices = [str(choice) for choice in row["choices"]]  # type: ignore[attr-defined]
        scores = [direct(model, context, TOKENIZER.tokenize("  " + choice))[0] for choice in choices]
        right += scores.index(max(scores)) == row["answer"]
    nats = size = 0.0
    for row in TEXTS:
        tokens = TOKENIZER.tokenize(row["text"])
        size += len(tokens)
        first, rest = tokens[:64], tokens[64:]
        nats -= direct(model, [TOKENIZER.eod], first)[0]
        if rest:
            nats -= direct(model, tokens[len(tokens) - 65 : 64], rest)[0]
    return {"acc": right / len(QUIZ), "bits_per_byte": nats / size / 0.6931471805599453}


def test_local_tasks_give_the_numbers_of_direct_computation(tasks: Path, tmp_path: Path) -> None:
    config = small_config(
        load=str(save_small(tmp_path / "small")),
        eval_tasks=[str(tasks)],
        eval_results_prefix=str(tmp_path / "out" / "small"),
    )
    run_evaluation(config, SINGLE)
    (path,) = (tmp_path / "out").iterdir()
    assert path.name.startswith("small_eval_results_")
    content = json.loads(path.read_text())
    expected, found = expected_scores(small_model()), content["results"]
    assert found["tiny_quiz"]["acc,none"] == pytest.approx(expected["acc"])
    assert found["tiny_texts"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], abs=1e-4)
    assert 0 <= found["tiny_answers"]["exact_match,none"] <= 1
    # All documents, and where the numbers come from.
    assert content["n-samples"]["tiny_quiz"] == {"original": 16, "effective": 16}
    assert content["config"]["checkpoint"].endswith("global_step7")
    assert content["config"]["neox_config"]["hidden_size"] == 48


def _results_of_rank(load: str, tasks: str, ports: dict[int, int]) -> list[dict[str, Any] | None]:
    """As a copy and then as a tensor rank, one after the other: the harness takes seconds to import."""
    return [_results_as(tensor_size, port, load, tasks) for tensor_size, port in ports.items()]


def _results_as(tensor_size: int, port: int, load: str, tasks: str) -> dict[str, Any] | None:
    os.environ["MASTER_PORT"] = str(port)
    config = small_config(load=load, model_parallel_size=tensor_size)
    with join(config, detect(os.environ)) as mesh:
        model, tokenizer = load_model(config, mesh)
        results = evaluate_model(model, tokenizer, config, tasks=find_tasks([tasks]), mesh=mesh)
    return None if results is None else {name: results["results"][name] for name in ("tiny_quiz", "tiny_texts")}


def test_two_processes_give_the_numbers_of_one(tasks: Path, tmp_path: Path) -> None:
    expected = expected_scores(small_model())
    ports = {tensor_size: free_port() for tensor_size in (1, 2)}
    first, second = run_ranks(_results_of_rank, 2, str(save_small(tmp_path)), str(tasks), ports)
    assert second == [None, None]
    for results in first:
        assert results["tiny_quiz"]["acc,none"] == pytest.approx(expected["acc"])
        assert results["tiny_texts"]["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], abs=1e-4)


def test_tasks_are_named_or_found_by_path(tasks: Path, tmp_path: Path) -> None:
    file = str(tasks / "tiny_quiz.yaml")
    assert find_tasks([file])[0] == [file]
    assert sorted(find_tasks([str(tasks)])[0]) == ["tiny_answers", "tiny_quiz", "tiny_texts"]
    for asked, message in (
        ([], "none given"),
        ([str(tmp_path)], "holds no task"),
        ([str(tasks / "absent.yaml")], "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            find_tasks(asked)


@pytest.mark.parametrize("source", ["nobody/nothing", "json\ndataset_kwargs: {data_files: {test: gone.json}}"])
def test_data_that_cannot_be_had_are_one_line(tmp_path: Path, source: str) -> None:
    task = tmp_path / "far.yaml"
    task.write_text(
        f"task: far\ndataset_path: {source}\ntest_split: test\noutput_type: loglikelihood\n"
        "doc_to_text: a\ndoc_to_target: b\nmetric_list: [{metric: acc}]\n"
    )
    with pytest.raises(UserError, match=r"^eval_tasks: the data of a task cannot be read \(.*(nothing|gone).*HF_HOME$"):
        evaluate_model(small_model(), TOKENIZER, small_config(), tasks=find_tasks([str(task)]), mesh=SINGLE)


def test_names_of_the_harness_and_patterns(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import manager

    # One of its families; the harness takes seconds to read its own thousands of files.
    shutil.copytree(Path(manager.__file__).parent / "lambada", tmp_path / "lambada")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    names, _ = find_tasks(["tiny_t*", "lambada_openai", str(tasks)])
    assert names == ["tiny_texts", "lambada_openai"]
    with pytest.raises(UserError, match="none of its tasks is named beside it; add tiny_answers say"):
        find_tasks(["lambada_openai", str(tasks)])


def test_a_misspelled_name_gets_a_suggestion(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    # The harness takes seconds to read its own thousands of files.
    quick = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: quick(include_path=include_path))
    with pytest.raises(UserError, match="'tiny_quizz' is no task of lm-evaluation-harness; did you mean 'tiny_quiz'"):
        find_tasks(["tiny_quizz", str(tasks)])


def test_the_result_file_is_named_as_upstream_names_it() -> None:
    now = datetime(2026, 3, 9, 7, 5, 2)
    assert result_path("", now) == Path("eval_results_03-09-2026-07-05-02.json")
    assert result_path("runs/a", now) == Path("runs/a_eval_results_03-09-2026-07-05-02.json")


def test_a_place_for_results_is_looked_for_before_the_model(tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = small_config(eval_tasks=[str(tasks / "tiny_quiz.yaml")], eval_results_prefix=str(tmp_path / "file" / "a"))
    with pytest.raises(UserError, match=r"cannot be written \(its parent is a file"):
        run_evaluation(config, SINGLE)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install \"neox\[eval\]\""):
        require_harness()


def test_the_harness_finds_the_package_evaluate_and_not_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    script = ModuleType("evaluate")
    script.__file__ = str(ROOT / "evaluate.py")
    monkeypatch.setitem(sys.modules, "evaluate", script)
    monkeypatch.syspath_prepend(str(ROOT))
    require_harness()
    assert hasattr(sys.modules["evaluate"], "load")


def test_cut_requests_are_said_once_and_not_on_stdout(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tasks / f"{name}.yaml") for name in ("tiny_quiz", "tiny_answers")]
    config = small_config(seq_length=16, max_position_embeddings=16)
    model = small_model(seq_length=16, max_position_embeddings=16)
    evaluate_model(model, TOKENIZER, config, tasks=find_tasks(names), mesh=SINGLE)
    shown = capsys.readouterr()
    # The three choices of each question, and its generated answer.
    line = "eval_tasks: 64 requests are longer than the model's 16 positions; only the end of their contexts was read"
    assert shown.err.count(line) == 1
    assert line not in shown.out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temperature": -1.0}, "temperature: -1.0 is not a temperature"),
        ({"temperature": "hot"}, "generation_kwargs of a task"),
        ({"temperature": 1.0, "top_k": -1}, "top_k: -1 is not a number of tokens"),
        ({"temperature": 1.0, "top_p": 7}, "top_p: 7.0 is not a probability"),
    ],
)
def test_sampling_that_means_nothing_is_refused(adapter: Any, asked: dict[str, Any], message: str) -> None:
    given = requests("generate_until", ("a", {"do_sample": True, "max_gen_toks": 2} | asked))
    with pytest.raises(UserError, match=f"^eval_tasks: .*{message}"):
        adapter.generate_until(given, disable_tqdm=True)


def test_a_temperature_of_0_is_greedy_whatever_else_is_said(adapter: Any) -> None:
    sampled, greedy = (
        adapter.generate_until(requests("generate_until", ("hello", {"max_gen_toks": 9} | extra)), disable_tqdm=True)
        for extra in ({"do_sample": True, "temperature": 0.0}, {})
    )
    assert sampled == greedy


def test_the_script_writes_and_shows_results(tasks: Path, tmp_path: Path) -> None:
    keys = SMALL | {"load": str(save_small(tmp_path / "small"))}
    (tmp_path / "small.yml").write_text(json.dumps(keys))
    words = [tmp_path / "small.yml", "--eval_tasks", tasks / "tiny_quiz.yaml"]
    done = fork_script("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("eval_results_*.json")
    accuracy = json.loads(path.read_text())["results"]["tiny_quiz"]["acc,none"]
    assert accuracy == pytest.approx(expected_scores(small_model())["acc"])
    assert "tiny_quiz" in done.stdout
