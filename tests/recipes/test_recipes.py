from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from anchored import recipe as recipes
from anchored.errors import RecipeError
from anchored.runs import Run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
LEAST = {"policy": {"model": "some/folder"}}


def write(path: Path, settings: object) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid_and_starts_with_its_command(path: Path) -> None:
    recipes.load(path)
    head = "".join(path.read_text().splitlines()[:2])
    assert re.search(rf"#.*anchored run recipes/{path.name}", head)


def test_only_the_policy_has_no_default(tmp_path: Path) -> None:
    recipe = recipes.load(write(tmp_path / "least.yaml", LEAST))
    assert recipe.train.objective.name == "apo-zero"
    assert (recipe.train.objective.beta, recipe.train.epochs, recipe.train.pairs_per_step) == (0.1, 18, 16)
    assert (recipe.train.optimizer.name, recipe.train.optimizer.lr) == ("rmsprop", 2e-7)
    with pytest.raises(RecipeError, match="policy: missing"):
        recipes.load(write(tmp_path / "empty.yaml", {"train": {}}))


def test_overrides_are_yaml_at_a_dotted_key(tmp_path: Path) -> None:
    path = write(tmp_path / "least.yaml", LEAST)
    recipe = recipes.load(
        path, ["train.epochs=4", "train.optimizer.lr=1e-4", "create.filters=[leak]", "train.data=null"]
    )
    assert (recipe.train.epochs, recipe.train.optimizer.lr, recipe.train.data) == (4, 1e-4, None)
    assert len(recipe.create.filters or ()) == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.epoch=4", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.objective.nam=dpo", "train.objective.nam: unknown key; did you mean 'name'?"),
        (
            "train.objective.name=apo-zeroo",
            "train.objective.name: 'apo-zeroo' is not a choice; did you mean 'apo-zero'?",
        ),
        ("train.objective.beta=-1", "train.objective.beta: must be greater than 0 (got -1)"),
        ("train.epochs=many", "train.epochs:"),
        ("trains.epochs=4", "trains: unknown key; did you mean 'train'?"),
        ("train.epochs", "an override is KEY=VALUE"),
        ("policy.model.name=x", "model is a value, not a section"),
        ("train.epochs=[", "the value is not YAML"),
        ("create.method=clare", "did you mean 'clair'?"),
    ],
)
def test_a_wrong_setting_is_named_with_the_way_out_on_one_line(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipes.load(write(tmp_path / "least.yaml", LEAST), [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["policy: [", "- 1", "", "\x00"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"odd\.yaml"):
        recipes.load(path)
    with pytest.raises(RecipeError, match="no such recipe"):
        recipes.load(tmp_path / "gone.yaml")


def test_a_changed_setting_is_named_with_both_values(tmp_path: Path) -> None:
    path, run = write(tmp_path / "least.yaml", LEAST), Run(tmp_path / "run")
    recipes.begin(run, recipes.load(path))
    recipes.begin(run, recipes.load(path))
    with pytest.raises(RecipeError, match=r"train\.objective\.beta is 0\.5, .* begun with 0\.1.*--redo train"):
        recipes.begin(run, recipes.load(path, ["train.objective.beta=0.5"]))
    with pytest.raises(RecipeError, match=r"create\.prompts\.take.*--redo create"):
        recipes.begin(run, recipes.load(path, ["create.prompts.take=7", "train.epochs=3"]))


def test_a_run_that_was_begun_before_a_setting_existed_goes_on(tmp_path: Path) -> None:
    path, run = write(tmp_path / "least.yaml", LEAST), Run(tmp_path / "run")
    recipes.begin(run, recipes.load(path))
    before = run.read_recipe() or {}
    del before["create"]["decontaminate"], before["train"]["optimizer"]["schedule"], before["train"]["seed"]
    run.recipe.write_text(yaml.safe_dump(before))
    recipes.begin(run, recipes.load(path))
    assert (run.read_recipe() or {})["train"]["optimizer"]["schedule"] == "linear"
    run.recipe.write_text(yaml.safe_dump(before))
    with pytest.raises(RecipeError, match=r"train\.seed is 5, but .* begun with 0;"):
        recipes.begin(run, recipes.load(path, ["train.seed=5"]))
    # a setting that this version has no more is named
    run.recipe.write_text(yaml.safe_dump({**before, "train": {**before["train"], "gone": 1}}))
    with pytest.raises(RecipeError, match=r"train\.gone is '\(not there\)', but .* begun with 1"):
        recipes.begin(run, recipes.load(path))


def test_how_a_run_is_done_may_change(tmp_path: Path) -> None:
    path, run = write(tmp_path / "least.yaml", LEAST), Run(tmp_path / "run")
    recipes.begin(run, recipes.load(path))
    recipes.begin(run, recipes.load(path, ["train.tokens_per_batch=100", "create.reviser.concurrency=3"]))
    assert run.read_recipe()["train"]["tokens_per_batch"] == 100  # type: ignore[index]


def test_how_each_of_several_endpoints_is_asked_may_change(tmp_path: Path) -> None:
    def recipe(concurrency: int, temperature: float) -> recipes.Recipe:
        one = {"model": "one", "base_url": "http://127.0.0.1:1/v1", "concurrency": concurrency}
        other = {"model": "other", "base_url": "http://127.0.0.1:1/v1", "temperature": temperature}
        create = {"method": "judge-off-policy", "candidates": [one, other]}
        return recipes.parse({**LEAST, "create": create}, "recipe.yaml")

    run = Run(tmp_path / "run")
    recipes.begin(run, recipe(8, 0.7))
    recipes.begin(run, recipe(9, 0.7))
    with pytest.raises(RecipeError, match=r"create\.candidates\.1\.temperature is 0\.2, .* begun with 0\.7"):
        recipes.begin(run, recipe(9, 0.2))


def test_one_setting_of_a_section_leaves_the_others_at_their_defaults(tmp_path: Path) -> None:
    path = write(tmp_path / "least.yaml", LEAST)
    sample = recipes.load(path, ["evaluate.sample.max_tokens=64"]).evaluate.sample
    assert (sample.temperature, sample.max_tokens) == (0.0, 64)
    assert recipes.load(path).evaluate.sample.temperature == 0.0


def test_benchmarks_may_be_chosen_after_training(tmp_path: Path) -> None:
    path, run = write(tmp_path / "least.yaml", LEAST), Run(tmp_path / "run")
    recipes.begin(run, recipes.load(path))
    run.complete("train", {})
    recipes.begin(run, recipes.load(path, ["evaluate.benchmarks=[questions.jsonl]"]))
    run.scores.write_text("")
    recipes.begin(run, recipes.load(path, ["evaluate.benchmarks=[questions.jsonl]"]))
    with pytest.raises(RecipeError, match=r"evaluate\.benchmarks is \[\].*--redo evaluate"):
        recipes.begin(run, recipes.load(path, ["evaluate.benchmarks=[]"]))


def test_the_resolved_recipe_is_a_recipe(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    recipe = recipes.load(RECIPES[0])
    recipes.begin(run, recipe)
    resolved = run.read_recipe()
    assert resolved is not None
    assert set(resolved.pop("versions")) >= {"anchored", "torch", "transformers"}
    assert recipes.parse(resolved, "resolved") == recipe


def test_the_schema_knows_every_section() -> None:
    assert set(json.loads(json.dumps(recipes.schema()))["properties"]) == {
        "policy",
        "create",
        "train",
        "evaluate",
        "limit",
    }


def test_how_a_model_is_served_may_change_and_what_it_answers_may_not(tmp_path: Path) -> None:
    path, run = write(tmp_path / "least.yaml", LEAST), Run(tmp_path / "run")
    recipes.begin(run, recipes.load(path, ["create.sample.serve=vllm"]))
    recipes.begin(
        run,
        recipes.load(
            path,
            [
                "create.sample.serve=vllm",
                "create.sample.serve_options={tensor_parallel_size: 2}",
                "create.sample.serve_env={CUDA_VISIBLE_DEVICES: '0,1'}",
            ],
        ),
    )
    with pytest.raises(RecipeError, match=r"create\.sample\.serve is None"):
        recipes.begin(run, recipes.load(path))
    with pytest.raises(RecipeError, match=r"create\.sample\.serve_options\.dtype is 'half'"):
        recipes.begin(run, recipes.load(path, ["create.sample.serve=vllm", "create.sample.serve_options.dtype=half"]))


def recipes_of_the_docs() -> list[tuple[str, str]]:
    """Every recipe that a page of the docs shows, and where it stands."""
    pages = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    blocks = [(page.name, re.findall(r"```yaml\n(.*?)```", page.read_text("utf-8"), re.DOTALL)) for page in pages]
    return [(page, text) for page, texts in blocks for text in texts if text.startswith("policy:")]


@pytest.mark.parametrize(("page", "text"), recipes_of_the_docs())
def test_every_recipe_of_the_docs_is_valid(tmp_path: Path, page: str, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    recipes.load(path)


def test_what_shapes_a_run_leaves_out_how_it_is_done_and_the_versions(tmp_path: Path) -> None:
    recipe = tmp_path / "team.yaml"
    recipe.write_text("policy: {model: m}\ncreate: {team: [{does: revise, model: a}, {does: revise, model: b}]}\n")
    run = Run(tmp_path / "run")
    recipes.write(run, recipes.load(recipe, ["train.device=cpu", "train.lora={rank: 4}"]))
    settings = recipes.shaping(run.read_recipe() or {})
    assert settings["train.lora.rank"] == 4
    assert settings["create.team.1.model"] == "b"
    assert settings["create.method"] == "clair"
    how = ("train.device", "train.threads", "create.team.0.concurrency", "create.team.1.base_url", "create.budget_usd")
    assert settings.keys().isdisjoint({*how, "versions.python"})


def test_a_run_of_a_version_without_a_setting_compares_as_one_with_its_default(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("policy: {model: m}\nevaluate: {benchmarks: [gsm8k], judge: {model: j}}\n")
    run = Run(tmp_path / "run")
    recipes.write(run, recipes.load(recipe))
    older = run.read_recipe() or {}
    del older["evaluate"]["lm_eval"], older["evaluate"]["judge"]["tries"]
    assert recipes.shaping(older) == recipes.shaping(run.read_recipe() or {})
