"""The shipped catalogue is whole, a wrong one is refused with all its faults, and a split depends on names and seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.axis.catalogue import Catalogue, Question, load_catalogue, split
from monitor.errors import CatalogueError

# The 275 roles of arXiv 2601.10387, in the order of the alphabet.
ROLES = """
aberration absurdist accountant activist actor addict adolescent advocate alien altruist amateur ambassador amnesiac
analyst anarchist ancient angel anthropologist archaeologist architect archivist artisan ascetic assistant auctioneer
auditor avatar bard bartender biologist blogger bohemian builder caregiver cartographer caveman celebrity chameleon
chef chemist chimera coach collaborator collector comedian competitor composer conservator consultant contrarian
coordinator coral_reef cosmopolitan counselor criminal critic crystalline curator cyborg cynic daredevil debugger
demon designer destroyer detective devils_advocate dilettante dispatcher divorcee doctor dreamer echo economist
ecosystem editor egregore elder eldritch emissary empath engineer entrepreneur evaluator evangelist examiner exile
expatriate facilitator familiar fixer flaneur fool forecaster futurist gamer generalist genie geographer ghost golem
gossip grader graduate grandparent guardian guide guru hacker healer hedonist hermit historian hive hoarder homunculus
hybrid idealist immigrant improviser infant influencer instructor interpreter interviewer jester journalist judge
lawyer leviathan librarian linguist loner luddite marketer martyr mathematician maverick mechanic mediator mentor
merchant minimalist moderator musician mycorrhizal mystic narcissist narrator naturalist navigator negotiator
networker newlywed nomad novelist nutritionist observer optimist oracle organizer orphan pacifist paramedic parasite
parent patient peacekeeper perfectionist pharmacist philosopher photographer physicist pilgrim pilot pirate planner
playwright podcaster poet polymath pragmatist predator presenter prey prisoner procrastinator prodigy producer
programmer proofreader prophet provincial provocateur psychologist publisher purist realist rebel recruiter refugee
reporter researcher retiree revenant reviewer revolutionary robot rogue romantic saboteur sage scheduler scholar
scientist scout screener secretary shaman shapeshifter simulacrum skeptic smuggler sociologist soldier sommelier
specialist spirit spy statistician stoic strategist student summarizer supervisor surfer survivor swarm symbiont
synthesizer teacher technologist teenager theorist therapist toddler traditionalist trainer translator tree trickster
tulpa tutor validator vampire vegan veteran veterinarian vigilante virtuoso virus visionary void wanderer warrior
whale widow wind witch witness workaholic wraith writer zealot zeitgeist
""".split()  # noqa: SIM905  a list of 275 lines would be no easier to read


@pytest.fixture(scope="module")
def shipped() -> Catalogue:
    return load_catalogue()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small catalogue of one's own."""
    roles = {role: [f"{role}, prompt {i}" for i in range(5)] for role in ("pirate", "ghost", "editor")}
    write(tmp_path, "roles", roles)
    write(tmp_path, "questions", [{"topic": "day", "text": f"Question {i}?"} for i in range(3)])
    write(tmp_path, "styles", [{"style": "poem", "text": "A haiku, please."}])
    write(tmp_path, "defaults", ["You are an AI assistant."])
    return tmp_path


def write(directory: Path, name: str, content: Any) -> None:
    (directory / f"{name}.json").write_text(json.dumps(content))


# The catalogue that ships


def test_it_has_every_role_of_the_paper(shipped: Catalogue) -> None:
    assert len(ROLES) == 275
    assert list(shipped.roles) == ROLES


def test_it_has_240_questions_spread_over_their_topics(shipped: Catalogue) -> None:
    topics = Counter(question.topic for question in shipped.questions)
    assert sum(topics.values()) == 240
    assert min(topics.values()) >= 10


def test_it_has_style_requests_enough_in_every_style(shipped: Catalogue) -> None:
    styles = Counter(request.style for request in shipped.styles)
    assert sum(styles.values()) >= 150
    assert set(styles) == {"creative_writing", "small_talk", "opinion", "feelings"}
    assert min(styles.values()) >= 30


def test_the_default_assistant_is_asked_without_a_system_message_with_an_empty_one_and_with_neutral_ones(
    shipped: Catalogue,
) -> None:
    absent, empty, *neutral = shipped.defaults
    assert absent is None
    assert empty == ""
    assert len(neutral) == 4 and all(neutral)


def test_no_prompt_of_a_role_is_a_mere_label(shipped: Catalogue) -> None:
    for role, prompts in shipped.roles.items():
        for prompt in prompts:
            # Most say two things, who the role is and how it speaks; a book of rules would drown so small a model.
            assert 15 <= len(prompt.split()) <= 100, (role, prompt)


# The version


def test_the_version_follows_the_content_and_not_its_order_of_roles(directory: Path) -> None:
    first = load_catalogue(directory)
    assert len(first.version) == 16
    roles = json.loads((directory / "roles.json").read_text())
    write(directory, "roles", dict(reversed(roles.items())))
    assert load_catalogue(directory) == first
    roles["ghost"][0] += "!"
    write(directory, "roles", roles)
    assert load_catalogue(directory).version != first.version


# One's own catalogue


def test_a_small_catalogue_of_ones_own_will_do(directory: Path) -> None:
    catalogue = load_catalogue(directory)
    assert list(catalogue.roles) == ["editor", "ghost", "pirate"]
    assert catalogue.questions[0] == Question("day", "Question 0?")
    assert catalogue.defaults == (None, "", "You are an AI assistant.")


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("roles", lambda c: {"pirate": c["pirate"], "ghost": c["ghost"]}, "roles: 2, needed are at least 3"),
        ("roles", lambda c: c | {"ghost": c["ghost"][:4]}, "'ghost' has 4 prompts, not 5"),
        ("roles", lambda c: c | {"ghost": [*c["ghost"][:4], "PIRATE,  prompt 0"]}, "prompts repeat 'pirate, prompt 0'"),
        ("roles", lambda c: c | {"ghost": [*c["ghost"][:4], " "]}, "is empty"),
        ("roles", lambda c: c | {" ": [f"{i}" for i in range(5)]}, "is empty"),
        ("roles", lambda c: list(c), "roles.json: Expected `object`"),
        ("questions", lambda c: [*c, c[0]], "repeat 'question 0?'"),
        ("questions", lambda c: c[:2], "questions: 2"),
        ("questions", lambda c: [*c, {"text": "Why?"}], "questions.json: Object missing required field `topic`"),
        ("styles", lambda _: [], "style requests: 0"),
        ("styles", lambda _: [{"style": "poem", "text": "Question 1?"}], "repeat 'question 1?'"),
        ("defaults", lambda _: [], "defaults: 0"),
        ("defaults", lambda _: [""], "is empty"),
        ("defaults", lambda c: c + c, "defaults repeat"),
    ],
)
def test_a_wrong_catalogue_is_refused(directory: Path, name: str, change: Callable[[Any], Any], problem: str) -> None:
    write(directory, name, change(json.loads((directory / f"{name}.json").read_text())))
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(directory)
    assert problem in caught.value.problem
    assert caught.value.cure


def test_a_role_that_is_pasted_twice_is_noticed_though_json_would_keep_the_last(directory: Path) -> None:
    path = directory / "roles.json"
    path.write_text(path.read_text().replace("{", '{"ghost": ["lost", "in", "silence", "without", "this"], ', 1))
    with pytest.raises(CatalogueError, match=r"roles\.json names 'ghost' twice"):
        load_catalogue(directory)


def test_all_problems_are_told_at_once(directory: Path) -> None:
    (directory / "defaults.json").unlink()
    (directory / "styles.json").write_text("[")
    write(directory, "questions", [])
    write(directory, "roles", {"pirate": ["Arr"]})
    with pytest.raises(CatalogueError) as caught:
        load_catalogue(directory)
    for problem in ("defaults.json", "styles.json", "questions: 0", "roles: 1", "'pirate' has 1 prompts"):
        assert problem in caught.value.problem


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"can't read roles\.json"):
        load_catalogue(tmp_path / "nothing")


# Splitting


def test_the_split_of_the_roles_is_the_same_in_every_process(shipped: Catalogue) -> None:
    script = (
        "from monitor.axis.catalogue import load_catalogue, split; import json;"
        "print(json.dumps(split(load_catalogue().roles, seed=7)))"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONHASHSEED": "99", "PYTHONPATH": root}
    other = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    here = split(shipped.roles, seed=7)
    assert json.loads(other.stdout) == here
    assert Counter(here.values()) == {"make": 137, "choose": 69, "report": 69}


def test_a_split_once_made_stays_so_in_every_release() -> None:
    assert split(["editor", "ghost", "pirate", "sage"], seed=0) == {
        "editor": "make",
        "ghost": "make",
        "pirate": "report",
        "sage": "choose",
    }


NAMES = st.sets(st.text(max_size=8), min_size=4, max_size=60)


@given(names=NAMES, seed=st.integers(), data=st.data())
def test_a_split_divides_all_names_at_exact_shares_whatever_their_order(
    names: set[str], seed: int, data: st.DataObject
) -> None:
    parts = split(sorted(names), seed)
    assert parts.keys() == names
    assert parts == split(data.draw(st.permutations(sorted(names))), seed)
    sizes = Counter(parts.values())
    n = len(names)
    assert (sizes["make"], sizes["choose"]) == (n // 2, 3 * n // 4 - n // 2)


def test_another_seed_is_another_split(shipped: Catalogue) -> None:
    assert split(shipped.roles, seed=0) != split(shipped.roles, seed=1)


def test_a_split_that_leaves_a_part_empty_is_refused() -> None:
    with pytest.raises(CatalogueError, match="nothing to choose"):
        split(["a", "b", "c"], seed=0, shares=(8, 1, 1))
    assert set(split(["a", "b"], seed=0, shares=(1, 0, 1)).values()) == {"make", "report"}


def test_names_that_repeat_are_refused() -> None:
    with pytest.raises(CatalogueError, match="repeat: a"):
        split(["a", "b", "a", "c"], seed=0)
