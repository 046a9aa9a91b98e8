"""Commands and pages for people; they may import anything, nothing imports them."""
