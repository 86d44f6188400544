#!/usr/bin/env python3
"""Uses virt-manager as somebody before its windows does: by names of buttons and rows, over AT-SPI, on the DISPLAY and the session
bus of the environment. One step a call; a step that finds not what it looks for says what there is, and fails.

    virt_manager.py row NAME                 the list has this machine (`NAME` and its state in words)
    virt_manager.py select NAME              a click on its row
    virt_manager.py window NAME              there is a window whose title begins so
    virt_manager.py press WINDOW ROLE NAME   the button (or tab, menu item, …) of that window
    virt_manager.py menu WINDOW MENU ITEM    an item of a menu
    virt_manager.py choose WINDOW ROW        a row of whatever list that window shows
    virt_manager.py choose-tab WINDOW NAME   a tab of that window
    virt_manager.py rows WINDOW              the first column of the lists that it shows, a line each
    virt_manager.py type WINDOW LABEL TEXT   into the field with this name or label
    virt_manager.py said                     what message boxes say; nothing when there is none
    virt_manager.py tree [WINDOW]            all that is to be seen, for who writes a suite
"""

import subprocess
import sys
import time
import warnings

import gi

gi.require_version("Atspi", "2.0")
from gi.repository import Atspi  # noqa: E402

warnings.simplefilter("ignore")
PATIENCE = 40.0


def below(node, depth=0):
    """`node` and all that is shown below it."""
    yield node
    if depth > 30:
        return
    for i in range(min(node.get_child_count(), 200)):
        child = node.get_child_at_index(i)
        if child is not None:
            yield from below(child, depth + 1)


def application():
    desktop = Atspi.get_desktop(0)
    for i in range(desktop.get_child_count()):
        child = desktop.get_child_at_index(i)
        if child is not None and child.get_name() == "virt-manager":
            return child
    return None


def windows():
    app = application()
    return [app.get_child_at_index(i) for i in range(app.get_child_count())] if app else []


def shown(node):
    return node.get_state_set().contains(Atspi.StateType.SHOWING)


def until(look, what):
    """What `look` finds, waited for; windows that close meanwhile are looked at again."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            found = look()
        except gi.repository.GLib.Error:
            found = None
        if found is not None and found != []:
            return found
        if time.monotonic() > end:
            tree([])
            sys.exit(f"there is no {what}")
        time.sleep(0.2)


def window(title):
    def look():
        return next((w for w in windows() if w.get_name().startswith(title) and shown(w)), None)

    return until(look, f"window {title!r}")


def find(root, role, name):
    """The one thing of that role and name that `root` shows."""
    for node in below(root):
        if node.get_role_name() == role and node.get_name() == name and shown(node):
            return node
    return None


def click(node):
    """With the mouse, in the middle."""
    at = node.get_extents(Atspi.CoordType.SCREEN)
    where = [str(at.x + min(at.width // 2, 60)), str(at.y + at.height // 2)]
    subprocess.run(["xdotool", "mousemove", *where, "click", "1"], check=True)
    time.sleep(0.3)


def press(arguments):
    title, role, name = arguments
    node = until(lambda: next((n for n in [find(window(title), role, name)] if n is not None and n.get_state_set().contains(Atspi.StateType.SENSITIVE)), None), f"{role} {name!r} that can be pressed")
    if not node.do_action(0):
        sys.exit(f"{role} {name!r} takes no press")


def menu(arguments):
    title, name, item = arguments
    root = window(title)
    head = until(lambda: next((n for n in below(root) if n.get_role_name() in ("menu", "toggle button") and n.get_name() == name), None), f"menu {name!r}")
    head.do_action(0)
    node = until(lambda: next((n for n in below(head) if n.get_role_name().endswith("menu item") and n.get_name() == item), None), f"item {item!r}")
    if not node.do_action(0):
        sys.exit(f"{item!r} takes no press")


def cells(root):
    return [n for n in below(root) if n.get_role_name() in ("table cell", "tree item", "list item") and shown(n) and n.get_name()]


def row(arguments):
    (name,) = arguments
    end = time.monotonic() + PATIENCE
    while True:
        words = [c.get_name().replace("\n", " ") for c in cells(window("Virtual Machine Manager"))]
        if name in words:
            return
        if time.monotonic() > end:
            sys.exit(f"the list has {words}")
        time.sleep(0.2)


def select(arguments):
    (name,) = arguments
    root = window("Virtual Machine Manager")
    click(until(lambda: next((c for c in cells(root) if c.get_name().split("\n")[0] == name), None), f"row {name!r}"))


def choose(arguments):
    title, name = arguments
    root = window(title)
    click(until(lambda: next((c for c in cells(root) if c.get_name() == name), None), f"row {name!r}"))


def choose_tab(arguments):
    title, name = arguments
    root = window(title)
    click(until(lambda: next((n for n in below(root) if n.get_role_name() == "page tab" and n.get_name() == name and shown(n)), None), f"tab {name!r}"))


def rows(arguments):
    (title,) = arguments
    for cell in until(lambda: cells(window(title)), "row"):
        print(cell.get_name().replace("\n", " "))


def typed(arguments):
    title, label, text = arguments
    root = window(title)

    def look():
        for node in below(root):
            if not shown(node) or node.get_role_name() not in ("text", "spin button", "password text", "combo box"):
                continue
            labels = [r.get_target(i).get_name() for r in node.get_relation_set() or [] for i in range(r.get_n_targets()) if r.get_relation_type() == Atspi.RelationType.LABELLED_BY]
            if label in (node.get_name(), *labels):
                return node
        return None

    node = until(look, f"field {label!r}")
    if node.get_role_name() == "spin button":
        node.set_current_value(float(text))
    else:
        node.set_text_contents(text)
    time.sleep(0.2)


def said(_):
    for w in windows():
        if w.get_role_name() in ("alert", "dialog") and shown(w):
            print(" ".join(n.get_name().replace("\n", " ") for n in below(w) if n.get_role_name() == "label" and shown(n) and n.get_name()))


def tree(arguments):
    def show(node, depth):
        if not shown(node) and depth > 1:
            return
        print("  " * depth + node.get_role_name(), repr(node.get_name()))
        for i in range(min(node.get_child_count(), 80)):
            child = node.get_child_at_index(i)
            if child is not None:
                show(child, depth + 1)

    for w in [window(arguments[0])] if arguments else windows():
        show(w, 0)


STEPS = {"row": row, "select": select, "press": press, "menu": menu, "choose": choose, "choose-tab": choose_tab, "rows": rows, "type": typed, "said": said, "tree": tree, "window": lambda a: window(a[0])}


def main():
    Atspi.init()
    step, *arguments = sys.argv[1:]
    STEPS[step](arguments)


main()
