#!/usr/bin/env python3
"""Uses cockpit's page of machines as somebody before a browser does: Chromium, driven by chromedriver (W3C WebDriver on loopback),
by the words on its buttons. One step a call; the browser and where it stands are kept between calls. A step that finds not what
it looks for says what the page shows, and fails. Nothing but the standard library, as it runs where the browser is.

    cockpit.py open URL              a browser at this address; the one before it is closed
    cockpit.py login USER PASSWORD   fills in cockpit's first page
    cockpit.py go PATH               another page of the same cockpit
    cockpit.py shows TEXT            the page shows this text
    cockpit.py lacks TEXT            it does not, or not any more
    cockpit.py find CSS              there is such an element
    cockpit.py row NAME TEXT         the row of the machine NAME has this text
    cockpit.py press CSS             a click on the element
    cockpit.py button TEXT           a click on the button, link or item with this text
    cockpit.py type CSS TEXT         into the field, over what was there
    cockpit.py choose CSS VALUE      of a list, by its value
    cockpit.py keys TEXT             typed to whatever has the focus
    cockpit.py colours CSS           how many colours the canvas has
    cockpit.py text [CSS]            what is to be read there
    cockpit.py errors                what alerts say, and what the page stumbled over, as the browser's console has it
    cockpit.py picture FILE          what the window shows, as PNG
    cockpit.py close                 the end of the browser
"""

import base64
import json
import sys
import time
import urllib.error
import urllib.request

DRIVER = "http://127.0.0.1:9515"
KEPT = "/root/.browser"
PATIENCE = 60.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
# Chromium's sandbox needs what a container may not; what it is shown is cockpit alone.
ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1000", "--lang=en"]


class Refused(Exception):
    pass


def ask(method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(DRIVER + path, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as e:
        value = json.load(e)["value"]
        raise Refused(f"{value['error']}: {value['message'].splitlines()[0]}") from None


def session():
    with open(KEPT) as file:
        return "/session/" + file.read()


def script(text, *arguments):
    return ask("POST", session() + "/execute/sync", {"script": text, "args": list(arguments)})


def enter():
    """Into the frame of cockpit's page; the first page of all has none."""
    ask("POST", session() + "/frame", {"id": None})
    frames = ask("POST", session() + "/elements", {"using": "css selector", "value": "iframe.container-frame:not([style*='display: none'])"})
    for frame in frames:
        if script("return arguments[0].offsetParent !== null || arguments[0].getClientRects().length > 0", frame):
            ask("POST", session() + "/frame", {"id": frame})


def page():
    return script("return document.body ? document.body.innerText : ''")


def until(look, what):
    """What `look` finds; a page that changes meanwhile is looked at again."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            enter()
            found = look()
        except Refused as e:
            # An element that has just gone, or is just covered.
            found, what = None, f"{what.split(' (')[0]} ({e})"
        if found:
            return found
        if time.monotonic() > end:
            enter()
            sys.exit(f"there is no {what}; the page shows:\n{page()}")
        time.sleep(0.2)


def elements(css):
    return ask("POST", session() + "/elements", {"using": "css selector", "value": css})


def shown(css):
    """The elements that are to be seen."""
    return [e for e in elements(css) if script("return arguments[0].getClientRects().length > 0", e)]


def click(element):
    script("arguments[0].scrollIntoView({block: 'center'})", element)
    ask("POST", f"{session()}/element/{element[ELEMENT]}/click", {})
    return True


def open_browser(url):
    try:
        ask("DELETE", session())
    except (OSError, Refused):
        pass
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": {"args": ARGUMENTS},
        "goog:loggingPrefs": {"browser": "ALL"},
        "acceptInsecureCerts": True,
    }
    made = ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
    with open(KEPT, "w") as file:
        file.write(made["sessionId"])
    go_to(url)


def go_to(url):
    ask("POST", session() + "/url", {"url": url})


def login(user, password):
    typed("#login-user-input", user)
    typed("#login-password-input", password)
    press("#login-button")
    until(lambda: elements("iframe.container-frame") or script("return window.frameElement !== null"), "page after the login")


def go(path):
    ask("POST", session() + "/frame", {"id": None})
    now = ask("GET", session() + "/url")
    go_to("/".join(now.split("/")[:3]) + path)


def shows(text):
    until(lambda: text in page(), f"text {text!r}")


def lacks(text):
    until(lambda: text not in page(), f"page without {text!r}")


def find(css):
    until(lambda: shown(css), f"element {css!r}")


def row(name, text):
    def look():
        return script(
            "return [...document.querySelectorAll('tr, [role=row]')].some(r => r.getClientRects().length &&"
            " r.innerText.split('\\n').some(l => l.trim() === arguments[0] || l.split('\\t')[0].trim() === arguments[0]) && r.innerText.includes(arguments[1]))",
            name,
            text,
        )

    until(look, f"row of {name!r} with {text!r}")


def press(css):
    until(lambda: click(shown(css)[0]) if shown(css) else None, f"element {css!r} that can be pressed")


def button(text):
    def look():
        found = script(
            "return [...document.querySelectorAll('button, a, [role=menuitem], [role=tab], [role=option], label')]"
            ".filter(b => b.getClientRects().length && !b.disabled && b.getAttribute('aria-disabled') !== 'true' && b.innerText.trim() === arguments[0])",
            text,
        )
        # What lies in a dialog or menu comes last.
        return click(found[-1]) if found else None

    until(look, f"button {text!r} that can be pressed")


def typed(css, text):
    def look():
        found = shown(css)
        if not found:
            return None
        click(found[0])
        # All of it is chosen, and what is typed takes its place, so that the page hears of it.
        script("arguments[0].select && arguments[0].select()", found[0])
        ask("POST", f"{session()}/element/{found[0][ELEMENT]}/value", {"text": text})
        return True

    until(look, f"field {css!r}")


def choose(css, value):
    def look():
        found = shown(f"{css} option[value='{value}']") or elements(f"{css} option[value='{value}']")
        return click(found[0]) if found else None

    until(look, f"choice {value!r} of {css!r}")


def keys(text):
    enter()
    actions = [{"type": kind, "value": key} for key in text for kind in ("keyDown", "keyUp")]
    ask("POST", session() + "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})


def colours(css):
    def look():
        return script(
            "const c = document.querySelector(arguments[0]); if (!c || !c.width) return 0;"
            "const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
            "return new Set(d).size",
            css,
        )

    print(until(look, f"canvas {css!r}"))


def text(css="body"):
    print(until(lambda: [script("return arguments[0].innerText", e) for e in shown(css)], f"element {css!r}")[0])


def errors():
    enter()
    for words in script(
        "return [...document.querySelectorAll('.pf-m-danger, .pf-m-warning')].filter(e => /alert/.test(e.className) && e.getClientRects().length).map(e => e.innerText)"
    ):
        print(words.replace("\n", " "))
    for line in ask("POST", session() + "/se/log", {"type": "browser"}):
        if "Uncaught" in line["message"]:
            print(line["message"])


def picture(file):
    ask("POST", session() + "/frame", {"id": None})
    with open(file, "wb") as out:
        out.write(base64.b64decode(ask("GET", session() + "/screenshot")))


def close():
    ask("DELETE", session())


STEPS = {
    "open": open_browser, "login": login, "go": go, "shows": shows, "lacks": lacks, "find": find, "row": row, "press": press, "button": button,
    "type": typed, "choose": choose, "keys": keys, "colours": colours, "text": text, "errors": errors, "picture": picture, "close": close,
}


def main():
    step, *arguments = sys.argv[1:]
    STEPS[step](*arguments)


main()
