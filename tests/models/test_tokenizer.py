"""Tokenizer: ids and chat templates against transformers, streaming, and what is refused."""

import json

import jinja2
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from commfuse.errors import UsageError
from commfuse.models.smollm2 import ensure_smollm2
from commfuse.models.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "The ring all-reduce moves 2(W-1)/W of the data.",
    "   three leading spaces, and trailing   ",
    "tabs\tand\nnew\r\nlines\n\n\n  mixed",
    "Zażółć gęślą jaźń — naïve café, Straße, Ελληνικά, русский, עברית, العربية, हिन्दी",
    "漢字とかな 한국어 \u200b\u00a0\ufeff zero width",
    "emoji 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ \U0001f9ff",
    "1 12 123 1234567890 3.14159 1,000,000 ² ½ ٣٤",
    "def f(x: int) -> list[str]:\n    return [f'{x!r:>{8}}' for _ in range(10)]  # ok?\n",
    "it's we'll I'VE don't 'tis they\u2019re",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_start|",
    "a" * 300 + "!?" * 50,
    "e\u0301 \u0001 \x7f \ufffd \ud7ff \U0010ffff",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is a mesh?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi\n\n"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2 <|im_end|> 👍"},
        {"role": "user", "content": "<b>&'quoted'</b>"},
    ],
]


@pytest.fixture(scope="module")
def ours():
    return Tokenizer.from_directory(ensure_smollm2())


@pytest.fixture(scope="module")
def theirs():
    return AutoTokenizer.from_pretrained(ensure_smollm2())


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(text, ours, theirs):
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == text == theirs.decode(ids)


@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_as_transformers_has_it(ours, theirs, text):
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_equals_that_of_transformers(messages, ours, theirs):
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == text
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(messages) == ids


def test_text_that_is_no_unicode(ours):
    """What Python makes of command-line bytes that are not UTF-8."""
    broken = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(UsageError, match="position 3 of the text is no character"):
        ours.encode(broken)
    with pytest.raises(UsageError, match="is no character"):
        ours.encode_chat([{"role": "user", "content": broken}])


def test_special_tokens(ours, theirs):
    assert ours.eos_token_ids == (2,)
    assert ours.special_tokens["bos_token"] == theirs.bos_token == "<|im_start|>"
    assert ours.vocab_size == len(theirs) == 49152


# The vocabulary lacks the bytes of some control characters and of planes that are not in use.
KNOWN = st.characters(
    codec="utf-8",
    max_codepoint=0x3FFFF,
    exclude_characters="\ufffd\x04\x06\x13\x14\x16\x1d",
)


@given(text=st.text(alphabet=KNOWN))
def test_streaming_emits_whole_characters(ours, text):
    ids = ours.encode(text)
    stream, seen = ours.stream(skip_special_tokens=False), ""
    for index, token in enumerate(ids):
        piece = stream.push(token)
        assert "\ufffd" not in piece
        seen += piece
        # Nothing is held back but for an incomplete character.
        so_far = ours.decode(ids[: index + 1], skip_special_tokens=False)
        assert seen == so_far or (so_far.endswith("\ufffd") and so_far.startswith(seen))
    assert stream.flush() == ""
    assert seen == text


@given(ids=st.lists(st.integers(0, 49151), max_size=24))
def test_streaming_any_ids(ours, ids):
    """Ids that no text gives, broken characters among them: the pieces join to the whole."""
    stream = ours.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == ours.decode(ids)


def test_streaming_a_broken_end(ours):
    ids = ours.encode("ok 👍")
    stream = ours.stream()
    assert stream.push(*ids[:-1]) == ""
    assert stream.flush() == "ok \ufffd"
    assert stream.push(*ids) == "ok 👍"


def byte_fallback_tokenizer():
    """A tokenizer as SentencePiece models have it: spaces as ▁, unknown characters as bytes."""
    tokens = ["<unk>", "▁", "a", "b", "▁a", "▁b"] + [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [("▁", "a"), ("▁", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


@given(text=st.text(alphabet="ab é€👍", max_size=12).filter(lambda text: not text.startswith(" ")))
def test_streaming_byte_fallback(text):
    """There a run of bytes decodes all or nothing, and the first space belongs to no text."""
    tokenizer = byte_fallback_tokenizer()
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


def write_tokenizer(path, **settings):
    backend = byte_fallback_tokenizer().backend
    backend.enable_truncation(4)
    backend.enable_padding()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def chat(path, template, messages=CONVERSATIONS[0], **settings):
    write_tokenizer(path, chat_template=template, **settings)
    return Tokenizer.from_directory(path).render_chat(messages)


def test_template_environment(tmp_path):
    assert chat(tmp_path, "{{ messages | tojson }}") == (
        '[{"role": "user", "content": "What is a mesh?"}]'
    )
    assert chat(tmp_path, "{{ {'b': '<é>'} | tojson(indent=1) }}") == '{\n "b": "<é>"\n}'
    assert chat(tmp_path, "{{ strftime_now('%Y') }}").startswith("20")
    # Blocks leave no lines behind.
    assert chat(tmp_path, "{% if true %}\n  {% set x = 1 %}\nx{% endif %}\n") == "x"
    assert chat(tmp_path, "{% for m in [1, 2] %}{{ m }}{% break %}{% endfor %}") == "1"
    assert chat(tmp_path, "{% generation %}a{% endgeneration %}b") == "ab"
    assert chat(tmp_path, "{{ bos_token }}{{ tools }}", bos_token={"content": "<s>"}) == "<s>None"
    assert chat(tmp_path, "{{ add_generation_prompt }}") == "True"
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    assert chat(tmp_path, named) == "d"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert chat(tmp_path, "from the settings") == "from the file"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ messages[0].role + 1 }}", "failed"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_fail(template, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        chat(tmp_path, template)
    assert str(tmp_path) in str(caught.value)


def test_settings_of_the_file_do_not_cut_or_pad(tmp_path):
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path))
    assert len(tokenizer.encode("abababab")) > 4
    assert len(tokenizer.encode("a")) == 1


def test_end_of_sequence(tmp_path):
    write_tokenizer(tmp_path, eos_token="b")
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == (3,)
    assert Tokenizer.from_directory(tmp_path, (7, 8)).eos_token_ids == (7, 8)
    write_tokenizer(tmp_path, eos_token="not in the vocabulary")
    assert Tokenizer.from_directory(tmp_path).eos_token_ids == ()


def test_unusable_files(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_directory(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UsageError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_directory(tmp_path)


def gguf_metadata(pre, **more):
    """A byte-level vocabulary with one merge, a word that no merge builds, and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "Ġt", "zebra", "<s>", "</s>", "<think>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(alphabet) + 2) + [3, 3, 4],
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("</s>"),
        "tokenizer.ggml.add_bos_token": False,
    } | {f"tokenizer.{key}": value for key, value in more.items()}


def words(pre, text):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre), (), "m.gguf")
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[begin:end] for _, (begin, end) in cut]


@pytest.mark.parametrize(
    ("pre", "cut"),
    [
        ("gpt-2", "It|'s| 12345| (|ok|)|\n\n | x|'|LL|\r\n"),
        ("smollm", "It|'s| |1|2|3|4|5| (|ok|)|\n\n | x|'|LL|\r\n"),
        ("llama-bpe", "It|'s| |123|45| (|ok|)\n\n| | x|'LL|\r\n"),
        ("qwen2", "It|'s| |1|2|3|4|5| (|ok|)\n\n| | x|'LL|\r\n"),
    ],
)
def test_gguf_pre_tokenizers(pre, cut):
    assert words(pre, cut.replace("|", "")) == cut.split("|")


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_gguf_tokenizers(pre):
    tokenizer = Tokenizer.from_gguf(gguf_metadata(pre), (5,), "m.gguf")
    tokens = gguf_metadata(pre)["tokenizer.ggml.tokens"]
    text = "<s> tea, 漢 <think>x</s>"
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids[:3]] == ["<s>", "Ġt", "e"]
    assert tokens.index("<think>") in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == " tea, 漢 <think>x"
    assert tokenizer.eos_token_ids == (5,)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    # Only Llama 3 takes words of the vocabulary that no merge builds.
    assert (len(tokenizer.encode("zebra")) == 1) == (pre == "llama-bpe")
    # Only Qwen composes characters first.
    assert (tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")) == (pre == "qwen2")


def test_gguf_first_token_and_template():
    more = {"ggml.add_bos_token": True, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = Tokenizer.from_gguf(gguf_metadata("qwen2", **more), (), "m.gguf")
    bos = gguf_metadata("qwen2")["tokenizer.ggml.bos_token_id"]
    assert tokenizer.encode("a") == [bos, *tokenizer.encode("a")[1:]]
    # The template writes it: it must not come twice.
    assert tokenizer.encode_chat([{"content": "a"}]) == tokenizer.encode("a")
    unsaid = gguf_metadata("llama-bpe")
    del unsaid["tokenizer.ggml.add_bos_token"]
    assert Tokenizer.from_gguf(unsaid, (), "m.gguf").encode("a")[0] == bos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.model": "llama"}, "tokenizer 'llama'; supported is 'gpt2'"),
        ({"ggml.pre": "tekken"}, "'tekken'; supported are gpt-2, smollm, llama-bpe, qwen2"),
        ({"ggml.merges": []}, r"lacks tokenizer\.ggml\.merges"),
        ({"ggml.merges": ["absent too"]}, "damaged tokenizer"),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": -1}, "names none"),
    ],
)
def test_gguf_tokenizers_that_are_refused(change, message):
    with pytest.raises(UsageError, match=message) as caught:
        Tokenizer.from_gguf(gguf_metadata("smollm", **change), (), "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_templates_are_compiled_once(tmp_path, monkeypatch):
    write_tokenizer(tmp_path, chat_template="x")
    tokenizer = Tokenizer.from_directory(tmp_path)
    tokenizer.render_chat(CONVERSATIONS[0])
    monkeypatch.setattr(jinja2.sandbox.ImmutableSandboxedEnvironment, "from_string", None)
    assert tokenizer.render_chat(CONVERSATIONS[0]) == "x"
