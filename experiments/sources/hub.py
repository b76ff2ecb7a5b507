"""Whether the hub has a model or a text, in its local cache or online. Loads neither; imports no torch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from experiments.config import DataConfig, ModelConfig
from experiments.files import SourceError, one_line, parse_json
from experiments.sources.models import in_hub_cache, shards_below
from experiments.sources.revisions import is_commit, note_commit

PROBE_SECONDS = 7.0  # time limit of all requests together; with imports the decision takes less than 10 s

NOT_ASKED = "the hub was not asked, as HF_HUB_OFFLINE is set"
FAILED_BEFORE = "the hub was not asked again after it had failed"
Question = tuple[str, str | None, str]  # repository, revision, "model" or "dataset"
_answers: dict[Question, str | None] = {}  # None: the hub has it; else why not
_gave_up = False  # this process itself has set HF_HUB_OFFLINE


def model_is_cached(model: ModelConfig, index: int) -> bool:
    """Whether the hub's cache holds the model as far as decoder layer `index`."""
    if not (in_hub_cache(model, "config.json") and in_hub_cache(model, "tokenizer.json")):
        return False
    if in_hub_cache(model, "model.safetensors"):
        return True
    table = in_hub_cache(model, "model.safetensors.index.json")
    if table is None:
        return False
    try:
        needed = shards_below(parse_json(table.read_bytes())["weight_map"], index + 1)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # it is damaged: the hub has another copy
    return bool(needed) and all(in_hub_cache(model, shard) for shard in needed)


def dataset_is_cached(data: DataConfig) -> bool:
    """Whether the datasets library has prepared this table before."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    prepared = folder / str(data.repo).replace("/", "___") / (data.subset or "default")
    return any(prepared.glob(f"*/{data.revision or '*'}"))


def why_not(questions: Iterable[Question]) -> dict[Question, str]:
    """The questions to which the hub's answer is not yes → why. Each is asked once per process."""
    questions = list(questions)
    _probe([question for question in questions if question not in _answers])
    return {question: reason for question in questions if (reason := _answers[question]) is not None}


def learn_commits(questions: Iterable[Question]) -> None:
    """Ask for the commits of branches and tags, because a branch that moves is another source."""
    moving = [question for question in questions if not is_commit(question[1])]
    _probe([question for question in moving if question not in _answers])


def _probe(questions: list[Question]) -> None:
    """Ask the hub for each repository concurrently, and wait at most PROBE_SECONDS.

    The DNS lookup has no time limit, so a request may hang. Each runs in a daemon thread, which may outlive the call.
    """
    if not questions:
        return
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        _answers.update(dict.fromkeys(questions, FAILED_BEFORE if _gave_up else NOT_ASKED))
        return
    errors = _ask_all(questions)
    late = f"no answer from {constants.ENDPOINT} within {PROBE_SECONDS:.0f} s"
    for question in questions:
        if question not in errors:
            _answers[question] = late
        else:
            error = errors[question]
            _answers[question] = None if error is None else _reason(error, question)


def _ask_all(questions: list[Question]) -> dict[Question, Exception | None]:
    """question → the error of its request, None if the hub has the repository. Requests that hang are missing."""
    from huggingface_hub import HfApi

    errors: dict[Question, Exception | None] = {}

    def ask(question: Question) -> None:
        repo, revision, kind = question
        try:
            answer = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=PROBE_SECONDS - 1)
            note_commit(repo, revision, getattr(answer, "sha", None))
            errors[question] = None
        except Exception as error:  # any error means that the source is not available
            errors[question] = error

    threads = [threading.Thread(target=ask, args=(question,), daemon=True) for question in questions]
    deadline = time.monotonic() + PROBE_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(errors)


def _reason(error: Exception, question: Question) -> str:
    """A short reason why the hub is out of reach. Raises SourceError if the hub answers that it has no such name."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, revision, kind = question
    if isinstance(error, GatedRepoError):
        raise SourceError(f"{kind} {repo} is gated: accept its terms on the hub and log in (hf auth login).")
    response = getattr(error, "response", None)
    # A proxy may answer 401 or 404 itself. The hub's own answers have this header.
    signed = getattr(response, "headers", {}).get("x-error-code")
    if signed and isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        raise SourceError(f"the hub has no {kind} {repo} at revision {revision or 'main'}: check name and revision.")
    return f"{type(error).__name__}: {one_line(error)[:120]}"


def stop_asking() -> None:
    """Set HF_HUB_OFFLINE, so that libraries read cached files without retries. Child processes inherit it."""
    global _gave_up
    _gave_up = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
