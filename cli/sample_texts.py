"""The texts that `dwakd check` looks at when it is given none: languages, scripts, code, figures.

Written for this purpose. Every language says about the same, so that lengths compare.
"""

from __future__ import annotations

SAMPLE: dict[str, tuple[str, ...]] = {
    "English": (
        "The bakery on the corner opens at six, and the first loaves are gone by half past seven.",
        "If you want to learn a language, read something in it every day, even if it is one page.",
    ),
    "English, capitals": (
        "THE BAKERY ON THE CORNER OPENS AT SIX, AND THE FIRST LOAVES ARE GONE BY HALF PAST SEVEN.",
        "IF YOU WANT TO LEARN A LANGUAGE, READ SOMETHING IN IT EVERY DAY, EVEN IF IT IS ONE PAGE.",
    ),
    "French": (
        "La boulangerie du coin ouvre à six heures, et les premiers pains sont déjà vendus à sept.",
        "Si vous voulez apprendre une langue, lisez-la chaque jour, même s'il ne s'agit que d'une "
        "page.",
    ),
    "German": (
        "Die Bäckerei an der Ecke öffnet um sechs, und um halb acht sind die ersten Brote weg.",
        "Wer eine Sprache lernen möchte, liest jeden Tag etwas in ihr, und sei es nur eine Seite.",
    ),
    "Spanish": (
        "La panadería de la esquina abre a las seis, y a las siete ya no hay primeros panes.",
        "Si quieres aprender una lengua, lee algo en ella cada día, aunque sea una sola página.",
    ),
    "Polish": (
        "Piekarnia na rogu otwiera się o szóstej, a pierwsze bochenki znikają przed wpół do ósmej.",
        "Jeśli chcesz nauczyć się języka, czytaj w nim coś każdego dnia, choćby jedną stronę.",
    ),
    "Turkish": (
        "Köşedeki fırın altıda açılır, ilk ekmekler yedi buçuğa kadar biter.",
        "Bir dil öğrenmek istiyorsan her gün o dilde bir şey oku, tek bir sayfa bile olsa.",
    ),
    "Vietnamese": (
        "Tiệm bánh ở góc phố mở cửa lúc sáu giờ, và những ổ bánh đầu tiên hết trước bảy rưỡi.",
        "Nếu bạn muốn học một ngôn ngữ, hãy đọc mỗi ngày, dù chỉ là một trang.",
    ),
    "Russian": (
        "Пекарня на углу открывается в шесть, и первые буханки раскупают к половине восьмого.",
        "Если вы хотите выучить язык, читайте на нём каждый день, хотя бы одну страницу.",
    ),
    "Greek": (
        "Ο φούρνος στη γωνία ανοίγει στις έξι, και τα πρώτα ψωμιά τελειώνουν πριν από τις επτά.",
        "Αν θέλεις να μάθεις μια γλώσσα, διάβαζε κάτι κάθε μέρα, έστω και μία σελίδα.",
    ),
    "Hebrew": (
        "המאפייה בפינה נפתחת בשש, והלחמים הראשונים נגמרים לפני שבע וחצי.",
        "אם אתה רוצה ללמוד שפה, קרא בה משהו בכל יום, גם אם זה רק עמוד אחד.",
    ),
    "Arabic": (
        "يفتح المخبز الذي في الزاوية في السادسة، وتنفد الأرغفة الأولى قبل السابعة والنصف.",
        "إذا أردت أن تتعلم لغة فاقرأ بها شيئا كل يوم، ولو صفحة واحدة.",
    ),
    "Hindi": (
        "कोने की बेकरी छह बजे खुलती है और पहली रोटियाँ साढ़े सात बजे तक बिक जाती हैं।",
        "अगर आप कोई भाषा सीखना चाहते हैं, तो हर दिन उसमें कुछ पढ़िए, चाहे एक ही पन्ना हो।",
    ),
    "Thai": (
        "ร้านขนมปังที่หัวมุมเปิดตอนหกโมงเช้า และขนมปังชุดแรกหมดก่อนเจ็ดโมงครึ่ง",
        "ถ้าอยากเรียนภาษา ให้อ่านอะไรสักอย่างทุกวัน แม้จะเป็นเพียงหน้าเดียว",
    ),
    "Chinese": (
        "街角的面包店六点开门，第一批面包七点半之前就卖完了。",
        "如果你想学一门语言，就每天用它读点东西，哪怕只有一页。",
    ),
    "Japanese": (
        "角のパン屋は六時に開き、最初のパンは七時半までに売り切れます。",
        "言葉を学びたいなら、たとえ一ページでも、毎日その言葉で何かを読みましょう。",
    ),
    "Korean": (
        "모퉁이 빵집은 여섯 시에 문을 열고, 첫 빵은 일곱 시 반이면 다 팔립니다.",
        "언어를 배우고 싶다면 한 쪽이라도 좋으니 날마다 그 언어로 된 글을 읽으세요.",
    ),
    "Emoji": (
        "Done! 🎉🎉 The tests pass ✅, the build is green 🟢 and the coffee is hot ☕️.",
        "Who is coming to the beach? 🏖️ 👩‍👩‍👧 yes, 🐕 yes, 🤷🏽 not sure yet.",
    ),
    "Python": (
        "def mean(values: list[float]) -> float:\n"
        '    """The arithmetic mean; raises ValueError if there is none."""\n'
        "    if not values:\n"
        '        raise ValueError("no values")\n'
        "    return sum(values) / len(values)\n",
        "for row in rows:\n\tif row is None:\n\t\tcontinue\n\n\tprint(row[0], end='\\t')\n",
    ),
    "JSON": (
        '{\n  "name": "bakery",\n  "open": {"from": "06:00", "to": "18:30"},\n  "loaves": 120\n}\n',
        '[{"id": 17, "ok": true, "tags": ["a", "b_c"]}, {"id": 18, "ok": false, "tags": []}]',
    ),
    "Numbers": (
        "In 2024 the bakery sold 48,716 loaves at 3.20 each: 155,891.20 in all, 7.4 % up on 2023.",
        "3.14159265 + 2.71828183 = 5.85987448; 65536 / 256 = 256; call 030 1234567 before 17:45.",
    ),
    "Markdown": (
        "## Opening hours\n\n- **Monday to Friday**: 6:00 to 18:30\n- *Saturday*: 7:00 to 13:00\n\n"
        "| loaf | price |\n|------|------:|\n| rye  |  3.20 |\n",
    ),
}
TEXTS: tuple[str, ...] = tuple(text for texts in SAMPLE.values() for text in texts)
