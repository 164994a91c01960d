"""`moe-lora push`: an adapter to the Hugging Face Hub, checked, with a card that strangers can use."""

from pathlib import Path
from typing import Annotated

import tyro
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from moe_lora_interop.checkpoint.card import CARD_NAME, GENERATION_CONFIG, new_card
from moe_lora_interop.checkpoint.inspection import inspect, verify
from moe_lora_interop.cli.shell import Json, Quiet, Shell
from moe_lora_interop.disk.files import CONFIG_NAME, WEIGHTS_NAME
from moe_lora_interop.errors import CheckpointError

NEEDED = (CONFIG_NAME, WEIGHTS_NAME)
# what trainers leave beside them: where a text ends, and the tokenizer, perhaps with a template of its own
OPTIONAL = (GENERATION_CONFIG, "tokenizer*", "*tokens*.json", "vocab.*", "merges.txt", "chat_template.jinja")


def push(
    directory: Annotated[Path, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    *,
    base: Path | None = None,
    private: bool = False,
    message: str = "Upload a mixture of LoRA experts",
    json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check an adapter, and upload it to the Hugging Face Hub. Exit code 1: it is not sound, and stays here.

    One commit with the config, the tensors, a tokenizer and a generation_config.json if they are there, and README.md:
    yours, or a card that names the place on the Hub and how it was trained. Nothing else of the directory is sent, and
    nothing in it is changed. Who you are says `hf auth login` or HF_TOKEN.

    Args:
        directory: The adapter's directory, in the native layout (`moe-lora convert` writes it).
        repo: USER/NAME; created if it is new.
        base: A Hugging Face model directory that the adapter must fit.
        private: Create the repository as a private one.
        message: Of the commit.
    """
    shell = Shell(quiet=quiet, json=json)
    with shell.progress("checking"):
        errors = [f.message for f in verify(directory, base) if f.level == "error"]
        if errors:
            shell.give({"sound": False, "findings": errors})
            for error in [] if json else errors:
                print(f"error: {error}")
            return 1
        found = inspect(directory)
        if found.layout != "native":
            problem = f"{directory}: found layout {found.layout}, expected native: `moe-lora convert` writes it"
            raise CheckpointError("cannot push", [problem])
    card = new_card(directory, found.config, found.tensors, repo_id=repo)
    others = sorted(path for pattern in OPTIONAL for path in directory.glob(pattern) if path.is_file())
    contents: dict[str, Path | bytes] = {path.name: path for path in (*(directory / name for name in NEEDED), *others)}
    contents[CARD_NAME] = directory / CARD_NAME if card is None else card.encode(errors="replace")
    with shell.progress(f"uploading to {repo}"):
        url = _uploaded(repo, contents, private=private, message=message)
    shell.say(f"{url}: {', '.join(contents)}{' (README.md as it is)' if card is None else ''}")
    shell.give({"sound": True, "url": url, "files": list(contents)})
    return 0


def _uploaded(repo: str, contents: dict[str, Path | bytes], *, private: bool, message: str) -> str:
    api = HfApi()
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(created.repo_id).private:
            raise CheckpointError(f"cannot push to {repo}", ["private: found a public repository of this name"])
        operations = [CommitOperationAdd(name, data) for name, data in contents.items()]
        api.create_commit(created.repo_id, operations, commit_message=message)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise CheckpointError(f"cannot push to {repo}", [" ".join(str(error).split())]) from None
    return created.url
