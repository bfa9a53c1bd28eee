"""What the pages show of results is what the files say."""

import pytest

from tests.pages import BLOCKS, ROOT, filled


@pytest.mark.parametrize("page", BLOCKS, ids=[str(page.relative_to(ROOT)) for page in BLOCKS])
def test_the_tables_of_a_page_are_those_of_the_files(page):
    assert page.read_text(encoding="utf-8") == filled(page)
