"""How one tokenizer spells the tokens of another, and one that is trained like it."""

from __future__ import annotations

from dwakd_plugin.tokenizers.respelling import ends_like, spellings
from dwakd_plugin.tokenizers.training import train_tokenizer
from tests import families
from tests.cutting import TEXTS


def test_tokens_are_spelled_by_bytes_across_kinds():
    new = train_tokenizer([*TEXTS, "東京 東京 東京 東京"] * 3, 480)
    for make in (families._llama2, families._gemma, families._smollm2, families._gpt2):
        old = make()
        spelled, before = spellings(new, old), old.convert_tokens_to_ids("a")
        for index in range(2, len(new)):
            text = new.decode([index])
            if "\ufffd" not in text:
                assert old.decode([before, *spelled[index]]) == "a" + text
        space = new.convert_tokens_to_ids("Ġ")
        assert len(spelled[space]) == 1  # and not the space that SentencePiece puts before
        assert spelled[new.eos_token_id] == [old.eos_token_id]
        assert spelled[new.pad_token_id] == []
        assert all(spelled[index] for index in range(2, len(new)))


def test_special_tokens_go_by_text_and_ends_by_what_they_are():
    old = families._qwen("<|im_end|>", "{{ messages }}")
    new = families._smollm2()
    spelled = spellings(new, old)
    start, end, text = (new.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "a"))
    assert spelled[start] == [old.convert_tokens_to_ids("<|im_start|>")]
    assert spelled[end] == [old.eos_token_id] and spelled[text] == [old.convert_tokens_to_ids("a")]
    ends = [old.eos_token_id, old.convert_tokens_to_ids("<|endoftext|>")]
    assert ends_like(new, old, ends) == [end, new.convert_tokens_to_ids("<|endoftext|>")]
    assert ends_like(train_tokenizer(TEXTS, 300), old, ends) == [0]


def test_a_trained_tokenizer_keeps_what_the_model_was_taught():
    old = families._llama3()
    new = train_tokenizer(TEXTS, 400, like=old)
    assert new.chat_template == old.chat_template
    for role in ("bos_token", "eos_token", "pad_token"):
        assert getattr(new, role) == getattr(old, role)
    assert new("Hi")["input_ids"][0] == new.bos_token_id
    chat = [{"role": "user", "content": "Hi"}]
    ids = new.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert new.convert_tokens_to_ids("<|start_header_id|>") in ids
    assert (
        new.decode(new("naïve 東京 🙂", add_special_tokens=False)["input_ids"]) == "naïve 東京 🙂"
    )
    assert "<|reserved|>" not in new.get_vocab()
