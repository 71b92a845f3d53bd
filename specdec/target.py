"""Loading what a user names, and turning a prompt or a conversation into tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.grammar import parse
from specdec.models.report import one_line
from specdec.models.toy import TOYS, load_toy

if TYPE_CHECKING:
    from specdec.models.loading import Loaded


def load_target(name: str, options: Mapping[str, Any], progress: Callable[[str, int, int], None]) -> "Loaded":
    """The model called `name`: the toy, or whatever `specdec.models.loading.load` knows."""
    if name.partition(":")[0] in TOYS:
        return load_toy(parse(name, "toy model", TOYS).options, device=options["device"])
    from specdec.models.loading import load

    return load(
        name,
        adapter=options["adapter"],
        dtype=None if options["dtype"] == "auto" else options["dtype"],
        device=options["device"],
        quantize=options.get("quantize"),
        trust_remote_code=options["trust_remote_code"],
        progress=progress,
    )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model called `name`, without its weights where they are files of their own."""
    if name.partition(":")[0] in TOYS:
        return load_toy(parse(name, "toy model", TOYS).options, device="cpu").tokenizer
    from specdec.models.report import silent
    from specdec.models.source import find_source
    from specdec.models.tokenizer import find_tokenizer, read_tokenizer

    source = find_source(name, silent, trust_remote_code=trust_remote_code)
    if source.converted:
        return read_tokenizer(source.folder)
    return find_tokenizer(source.folder, trust_remote_code=trust_remote_code)


def encode_prompt(loaded: "Loaded", prompt: str, *, chat: bool | None, system: str | None) -> list[int]:
    """The prompt's tokens, in the model's chat template when `chat` says so, or has no opinion and there is one."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    return encode_messages(loaded, [*messages, {"role": "user", "content": prompt}], chat=chat)


def encode_messages(loaded: "Loaded", messages: Sequence[Mapping[str, str]], *, chat: bool | None) -> list[int]:
    """The tokens of a conversation (`role` and `content`) whose next answer is wanted.

    Without a chat template the contents follow each other, separated by empty lines.
    """
    tokenizer = loaded.tokenizer
    has_template = getattr(tokenizer, "chat_template", None) is not None
    has_system = any(message["role"] == "system" for message in messages)
    if not has_template and (chat or has_system):
        raise ValueError(f"{loaded.name} has no chat template; leave out {'--chat' if chat else '--system'}")
    if chat is False or not has_template:
        return list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the chat template of {loaded.name} refuses this ({one_line(error)}); use --raw") from error
    # The template has written the special tokens already.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def check_length(loaded: "Loaded", prompt_tokens: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for the answer."""
    context = loaded.model.max_length
    if prompt_tokens >= context:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and the context of {loaded.name} is {context}; shorten the prompt"
        )
    if prompt_tokens + max_new_tokens > context:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {max_new_tokens} new ones exceed the context of {loaded.name}, "
            f"{context}; use --max-new-tokens {context - prompt_tokens} or less, or shorten the prompt"
        )
