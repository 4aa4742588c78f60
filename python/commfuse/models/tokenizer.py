"""Text to token ids and back, with the model's own chat template.

A thin wrapper over the ``tokenizers`` package: built from ``tokenizer.json`` or from the metadata
of a GGUF file. Chat templates are programs that come with the model, so they run in Jinja's
sandbox, with the names and options for which they are written:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from commfuse.errors import UsageError

_REPLACEMENT = "\ufffd"  # What a decoder shows for bytes that are not (yet) a character.

# How text is cut into words before the byte pairs are merged, by the name of
# tokenizer.ggml.pre. None is the pattern of GPT-2, which tokenizers has built in.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TYPES = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _WORDS % "{1,3}",
    "qwen2": _WORDS % "",
}
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
# Types of tokens in tokenizer.ggml.token_type.
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """Token ids of a model's text.

    Made by :meth:`from_directory` or :meth:`from_gguf`, mostly through
    ``Checkpoint.tokenizer()``. ``eos_token_ids`` are the ids that end a generation.

    Example::

        tokenizer = checkpoint.tokenizer()
        ids = tokenizer.encode_chat([{"role": "user", "content": "What is a ring all-reduce?"}])
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        source: str = "the model",
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self._source = source
        self._compiled_template: jinja2.Template | None = None

    @classmethod
    def from_directory(cls, path: Path, eos_token_ids: Sequence[int] = ()) -> "Tokenizer":
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``.

        Only the first must be there. Where ``eos_token_ids`` is empty, the end-of-sequence token
        of ``tokenizer_config.json`` is used. Raises UsageError naming the file.
        """
        file = path / "tokenizer.json"
        if not file.exists():
            raise UsageError(f"{file} does not exist; commfuse reads no other tokenizer file")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises a bare Exception for any damage.
            raise UsageError(f"{file} is not a tokenizer: {error}") from None
        settings: dict[str, Any] = {}
        settings_file = path / "tokenizer_config.json"
        if settings_file.exists():
            try:
                settings = json.loads(settings_file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UsageError(f"{settings_file} is not valid JSON: {error}") from None
        special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        template_file = path / "chat_template.jinja"
        if template_file.exists():
            template = template_file.read_text(encoding="utf-8")
        else:
            template = _default_template(settings.get("chat_template"))
        if not eos_token_ids and "eos_token" in special:
            eos = backend.token_to_id(special["eos_token"])
            eos_token_ids = () if eos is None else (eos,)
        return cls(backend, eos_token_ids, template, special, source=str(path))

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], eos_token_ids: Sequence[int], source: str
    ) -> "Tokenizer":
        """Build a byte-level BPE tokenizer from the ``tokenizer.*`` entries of a GGUF file.

        Raises UsageError for another kind of tokenizer or an unknown pre-tokenizer, naming both
        what the file has and what is supported.
        """
        kind = metadata.get("tokenizer.ggml.model")
        if kind != "gpt2":
            raise UsageError(
                f"{source}: unsupported tokenizer {kind!r}; supported is 'gpt2' (byte-level BPE)"
            )
        pre = metadata.get("tokenizer.ggml.pre")
        if pre not in _PRE_TYPES:
            raise UsageError(
                f"{source}: unsupported pre-tokenizer {pre!r}; supported are "
                f"{', '.join(_PRE_TYPES)}"
            )
        missing = [key for key in (_TOKENS, _MERGES) if not metadata.get(key)]
        if missing:
            raise UsageError(f"{source} lacks {', '.join(missing)}")
        tokens = metadata[_TOKENS]
        try:
            backend = _byte_level_bpe(tokens, metadata[_MERGES], pre)
        except Exception as error:  # tokenizers raises a bare Exception for inconsistent merges.
            raise UsageError(f"{source} has a damaged tokenizer: {error}") from None
        types = metadata.get("tokenizer.ggml.token_type") or []
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
                for token, kind in zip(tokens, types, strict=False)
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        special = {
            f"{name}_token": tokens[metadata[key]]
            for name, key in (
                ("bos", "tokenizer.ggml.bos_token_id"),
                ("eos", "tokenizer.ggml.eos_token_id"),
                ("unk", "tokenizer.ggml.unknown_token_id"),
                ("pad", "tokenizer.ggml.padding_token_id"),
            )
            if 0 <= metadata.get(key, -1) < len(tokens)
        }
        # Files of Llama 3 may lack the flag; its models always start with the token.
        if metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
            bos = special.get("bos_token")
            if bos is None:
                raise UsageError(f"{source} asks for a first token and names none")
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, metadata["tokenizer.ggml.bos_token_id"])]
            )
        template = metadata.get("tokenizer.chat_template")
        return cls(backend, eos_token_ids, template, special, source)

    @property
    def vocab_size(self) -> int:
        """Number of known ids, added tokens included; the model's own may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, with the tokens that the model wants around any text.

        Special tokens that are spelled out in the text become their ids. Raises UsageError for
        text that no UTF-8 expresses, as Python makes from undecodable command-line bytes.
        """
        return self._encode(text, add_special_tokens=True)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of a conversation, ready for the assistant's answer.

        messages: dicts with ``role`` and ``content``. Raises UsageError when the model has no
        chat template, or its template refuses these messages.
        """
        if self.chat_template is None:
            raise UsageError(f"{self._source} has no chat template; give a plain prompt instead")
        try:
            if self._compiled_template is None:
                self._compiled_template = _environment().from_string(self.chat_template)
            return self._compiled_template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UsageError(f"the chat template of {self._source} failed: {error}") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of :meth:`render_chat`'s text; the template writes all special tokens."""
        return self._encode(self.render_chat(messages), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"position {error.start} of the text is no character: {text[error.start]!r}; "
                "text must be valid UTF-8"
            ) from None
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``ids``; bytes that form no character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """Return a new incremental decoder, for one sequence of ids."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Decodes ids as they arrive and never emits half a character.

    The pieces that :meth:`push` returns, and then :meth:`flush`, join to the text of all ids.

    Example::

        stream = tokenizer.stream()
        for token in generate():
            print(stream.push(token), end="")
        print(stream.flush())
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # Some decoders treat the first token differently, so the ids of the piece emitted last
        # stay in the window as context: _emitted characters of the window's text are theirs.
        self._window: list[int] = []
        self._context = 0
        self._emitted = 0

    def push(self, *ids: int) -> str:
        """Add ids and return the new text, empty while a character is incomplete."""
        self._window.extend(ids)
        text = self._text(self._window)
        if text.endswith(_REPLACEMENT):
            return ""
        piece = text[self._emitted :]
        if piece:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._emitted = len(self._text(self._window))
        return piece

    def flush(self) -> str:
        """Return what is held back, a broken last character as U+FFFD, and start anew."""
        piece = self._text(self._window)[self._emitted :]
        self._window, self._context, self._emitted = [], 0, 0
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)


def _byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> tokenizers.Tokenizer:
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=pairs,
            # Llama 3 has words that its merges do not build.
            ignore_merges=pre == "llama-bpe",
        )
    )
    words = _PRE_TYPES[pre]
    steps: list[Any] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if words is not None:
        steps.append(pre_tokenizers.Split(tokenizers.Regex(words), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _default_template(template: Any) -> str | None:
    """Choose from the forms of tokenizer_config.json: a text, or a list of named templates."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """The tags {% generation %} ... {% endgeneration %}, which mark text and change nothing."""

    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which models have not been trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
