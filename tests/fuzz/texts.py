"""Texts that tokenizers, terminals and encodings trip over."""

from __future__ import annotations

from hypothesis import strategies as st

# What tokenizers, terminals and encodings trip over.
PIECES = [
    *("\0", "\x1b[2J", "\r", "\r\n", "\n\n\n", "\t", " ", "   ", "\u00a0", "\u2028", "\ufeff"),
    *("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷🇩🇪", "\u200d", "\u200b", "\ufe0f"),
    *("e\u0301", "\u0301\u0302", "ﬃ"),
    *("שלום", "مرحبا", "\u202eabc\u202c", "각", "각", "数学", "ฺกำ", "𝒳", "\U0010ffff", "ﷺ"),
    *("▁", "▁▁", "Ġ", "Ċ", "<0x0A>", "<0xFF>", "<unk>", "##ing", "</w>", "\\u0041", "\\"),
    *("</s>", "<s>", "<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<eos>", "<pad>"),
    *("### Response:\n", "[INST]", "{{ x }}", "{% raw %}", "[red]", "<script>", "$x_1$"),
    *("3.14159", "1234567890", "def f(x):\n    return x", "The function returns", "größte"),
]
TEXTS = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.lists(
        st.one_of(st.sampled_from(PIECES), st.text(max_size=5, alphabet="ab é数\n ")), max_size=10
    ).map("".join),
    st.sampled_from(["", " ", "x", "word " * 3000, "a" * 20_000, "数" * 3000, " " * 5000]),
)
