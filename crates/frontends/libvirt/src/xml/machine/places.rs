//! Where a `<graphics>` listens and how it is served, both ways: ports, addresses, websockets, and what QEMU is told of VNC. The
//! passwords of screens are read by [`super::read`].
//!
//! Without a place a screen listens on the loopback where the host lets it, and else nowhere, so that what tools write unasked is
//! taken on every host.

use super::{read::protocol, refuse, wrong};
use crate::{error::VirError, xml::Element};
use karst_engine::screens::ScreenListener;
use karst_model::{
    display::DisplayProtocol,
    screens::{KEYMAPS, Listen, SHARES, ScreenKind, ScreenOptions, ScreenPort, Screens},
};
use std::net::IpAddr;

/// What a document says of where its screens are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Places {
    /// Where they listen.
    pub screens: Screens,
    /// How they are served.
    pub options: ScreenOptions,
}

/// What one `<graphics>` says.
struct Said {
    listen: Option<Listen>,
    websocket: Option<ScreenPort>,
    options: ScreenOptions,
}

fn number(e: &Element, name: &str) -> Result<Option<i64>, VirError> {
    let parse = |text: &str| {
        text.trim().parse().map_err(|_| wrong(format!("cannot parse '{name}' of <graphics>: '{text}'")))
    };
    e.attribute(name).map(parse).transpose()
}

fn fixed(name: &str, n: i64) -> Result<ScreenPort, VirError> {
    match u16::try_from(n) {
        Ok(port) if port >= 1024 => Ok(ScreenPort::Fixed(port)),
        _ => {
            Err(refuse(&format!("graphics {name}"), format!("'{n}' is not there; 1024 to 65535 are, and -1")))
        }
    }
}

/// The address; nothing where none is said. `None` outside: it listens nowhere.
fn address(e: &Element) -> Result<Option<Option<IpAddr>>, VirError> {
    if e.all("listen").count() > 1 {
        return Err(refuse("graphics listen", "a screen listens at one place"));
    }
    let said = e.attribute("listen").filter(|a| !a.is_empty());
    let inner = e.find("listen");
    let text = match inner.map(|l| (l.attribute("type"), l.attribute("address"))) {
        Some((Some("none"), _)) => return Ok(None),
        Some((_, Some(inner))) if said.is_some_and(|s| s != inner) => {
            let said = said.unwrap_or_default();
            return Err(wrong(format!(
                "graphics 'listen' attribute '{said}' must match 'address' attribute of first listen element (found '{inner}')"
            )));
        }
        Some((_, Some(inner))) => Some(inner).filter(|a| !a.is_empty()),
        _ => said,
    };
    let parse = |text: &str| {
        text.parse().map_err(|_| {
            refuse(
                "graphics listen",
                format!("'{text}' is no address of IPv4 or IPv6; names are not looked up"),
            )
        })
    };
    Ok(Some(text.map(parse).transpose()?))
}

/// What one says that machines have.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the attribute.
fn said(e: &Element, protocol: DisplayProtocol) -> Result<Said, VirError> {
    let vnc = protocol == DisplayProtocol::Vnc;
    let automatic = e.attribute("autoport") == Some("yes");
    let port = match number(e, "port")? {
        _ if automatic => Some(ScreenPort::Auto),
        Some(-1) => Some(ScreenPort::Auto),
        // SPICE without a port listens nowhere, VNC somewhere.
        None | Some(0) => vnc.then_some(ScreenPort::Auto),
        Some(n) => Some(fixed("port", n)?),
    };
    let address = address(e)?;
    let listen = address.zip(port).map(|(address, port)| Listen { address, port });
    let websocket = match number(e, "websocket")?.filter(|_| vnc) {
        None | Some(0) => None,
        Some(-1) => Some(ScreenPort::Auto),
        Some(n) => Some(fixed("websocket", n)?),
    };
    let word = |name: &str, known: &[&str]| match e.attribute(name) {
        None => Ok(None),
        Some(word) if known.contains(&word) => Ok(Some(word.to_owned())),
        Some(word) => Err(refuse(
            &format!("graphics {name}"),
            format!("'{word}' is not there; {} are", known.join(", ")),
        )),
    };
    let mut options = ScreenOptions { keymap: word("keymap", KEYMAPS)?, ..ScreenOptions::default() };
    if vnc {
        options.share = word("sharePolicy", SHARES)?;
        options.power_control = word("powerControl", &["yes", "no"])?.is_some_and(|w| w == "yes");
    }
    Ok(Said { websocket: websocket.filter(|_| listen.is_some()), listen, options })
}

/// Adds what a `<graphics>` says to what those before it said.
///
/// # Errors
/// XML error; CONFIG_UNSUPPORTED, naming the attribute.
pub fn read(e: &Element, all: &mut Places) -> Result<(), VirError> {
    let Some(protocol) = protocol(e) else { return Ok(()) };
    let one = said(e, protocol)?;
    match protocol {
        DisplayProtocol::Vnc => {
            (all.screens.vnc, all.screens.websocket) = (one.listen, one.websocket);
            (all.options.share, all.options.power_control) = (one.options.share, one.options.power_control);
        }
        DisplayProtocol::Spice => all.screens.spice = one.listen,
    }
    let keymap = one.options.keymap;
    if let (Some(before), Some(now)) = (&all.options.keymap, &keymap)
        && before != now
    {
        return Err(refuse("graphics keymap", "a machine has one keyboard; give vnc and spice the same"));
    }
    if keymap.is_some() {
        all.options.keymap = keymap;
    }
    // Only now it is known of both.
    let fixed: Vec<_> = all.screens.listeners().filter(|(_, l)| l.port != ScreenPort::Auto).collect();
    let twice =
        |n: usize| fixed[..n].iter().any(|(_, l)| (l.at(), l.port) == (fixed[n].1.at(), fixed[n].1.port));
    match (0..fixed.len()).any(twice) {
        true => Err(refuse("graphics port", "two screens cannot listen at the same port")),
        false => Ok(()),
    }
}

/// Does a `<graphics>` still say what the machine is configured to have?
pub fn holds(e: &Element, now: &Places) -> bool {
    let Some(protocol) = protocol(e) else { return false };
    let Ok(one) = said(e, protocol) else { return false };
    let keymap = one.options.keymap.is_none() || one.options.keymap == now.options.keymap;
    keymap
        && match protocol {
            DisplayProtocol::Vnc => {
                one.listen == now.screens.vnc
                    && one.websocket == now.screens.websocket
                    && one.options.share == now.options.share
                    && one.options.power_control == now.options.power_control
            }
            DisplayProtocol::Spice => one.listen == now.screens.spice,
        }
}

/// A `<graphics>` that says how the machine is configured; or, of one that runs, where it really is.
pub fn shown(protocol: DisplayProtocol, now: &Places, live: Option<&[ScreenListener]>) -> Element {
    let mut e = Element::new("graphics").with("type", protocol.as_str());
    let (kind, listen, websocket) = match protocol {
        DisplayProtocol::Vnc => (ScreenKind::Vnc, now.screens.vnc, now.screens.websocket),
        DisplayProtocol::Spice => (ScreenKind::Spice, now.screens.spice, None),
    };
    let mut place = Element::new("listen").with("type", "none");
    let at = |kind: ScreenKind| live.and_then(|all| all.iter().find(|l| l.kind == kind)?.at);
    let real = at(kind);
    if let Some(listen) = listen.filter(|_| live.is_none() || real.is_some()) {
        let automatic = listen.port == ScreenPort::Auto;
        match (real, listen.port) {
            (Some(at), _) => e.set("port", at.port()),
            (None, ScreenPort::Fixed(port)) => e.set("port", port),
            (None, ScreenPort::Auto) if protocol == DisplayProtocol::Vnc => e.set("port", -1),
            (None, ScreenPort::Auto) => {}
        }
        e.set("autoport", if automatic { "yes" } else { "no" });
        match (at(ScreenKind::Websocket).filter(|_| kind == ScreenKind::Vnc), websocket) {
            (Some(at), _) => e.set("websocket", at.port()),
            (None, Some(ScreenPort::Fixed(port))) if live.is_none() => e.set("websocket", port),
            (None, Some(ScreenPort::Auto)) if live.is_none() => e.set("websocket", -1),
            _ => {}
        }
        place = Element::new("listen").with("type", "address");
        if let Some(address) = real.map(|at| at.ip()).or(listen.address) {
            e.set("listen", address);
            place.set("address", address);
        }
    }
    if let Some(keymap) = &now.options.keymap {
        e.set("keymap", keymap);
    }
    if protocol == DisplayProtocol::Vnc {
        if let Some(share) = &now.options.share {
            e.set("sharePolicy", share);
        }
        if now.options.power_control {
            e.set("powerControl", "yes");
        }
    }
    e.child(place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xml::read::document;

    fn of(text: &str) -> Result<Places, VirError> {
        let mut all = Places::default();
        document(text).unwrap().elements().iter().try_for_each(|e| read(e, &mut all)).map(|()| all)
    }

    fn one(text: &str) -> Result<Places, VirError> {
        of(&format!("<devices>{text}</devices>"))
    }

    #[test]
    fn places_of_screens_are_read() {
        for (text, vnc, websocket, spice) in [
            // Those of libvirt's own documents.
            ("<graphics type='vnc'/>", Some("auto"), None, None),
            ("<graphics type='vnc' port='-1' autoport='yes'/>", Some("auto"), None, None),
            (
                "<graphics type='vnc' port='5900' autoport='yes' listen='127.0.0.1'/>",
                Some("127.0.0.1:auto"),
                None,
                None,
            ),
            (
                "<graphics type='vnc' port='5903' autoport='no' listen='2001:1:2:3:4:5:1234:1234'>\
                 <listen type='address' address='2001:1:2:3:4:5:1234:1234'/></graphics>",
                Some("[2001:1:2:3:4:5:1234:1234]:5903"),
                None,
                None,
            ),
            (
                "<graphics type='vnc' port='5903' autoport='no'><listen type='address' address='::1'/></graphics>",
                Some("[::1]:5903"),
                None,
                None,
            ),
            (
                "<graphics type='vnc' port='5900' autoport='no' websocket='5700' listen='127.0.0.1'/>",
                Some("127.0.0.1:5900"),
                Some("5700"),
                None,
            ),
            ("<graphics type='vnc' websocket='-1'><listen type='none'/></graphics>", None, None, None),
            ("<graphics type='vnc' port='5901' websocket='-1'/>", Some("5901"), Some("auto"), None),
            ("<graphics type='spice'/>", None, None, None),
            ("<graphics type='spice' autoport='no'/>", None, None, None),
            ("<graphics type='spice' autoport='yes'/>", None, None, Some("auto")),
            (
                "<graphics type='spice' port='5903' autoport='no' listen='127.0.0.1'/>",
                None,
                None,
                Some("127.0.0.1:5903"),
            ),
            (
                "<graphics type='spice' autoport='yes'/><graphics type='vnc'/>",
                Some("auto"),
                None,
                Some("auto"),
            ),
        ] {
            let found = one(text).unwrap().screens.keys().map(|(_, value)| value);
            assert_eq!(found, [vnc, websocket, spice].map(|v| v.map(str::to_owned)), "{text}");
        }
        let options = one("<graphics type='vnc' sharePolicy='force-shared' powerControl='yes' keymap='de'/>");
        let options = options.unwrap().options;
        assert!(options.power_control && options.share.as_deref() == Some("force-shared"));
        assert_eq!(options.keymap.as_deref(), Some("de"));
    }

    #[test]
    fn what_is_shown_says_the_same() {
        for text in [
            "<graphics type='vnc'><listen type='none'/></graphics>",
            "<graphics type='vnc' websocket='-1' listen='::1'/>",
            "<graphics type='vnc' port='5907' websocket='5701' sharePolicy='ignore' powerControl='yes' keymap='en-us'/>",
            "<graphics type='spice' autoport='yes' listen='127.0.0.1'/>",
            "<graphics type='spice' port='5907' keymap='de-ch'/><graphics type='vnc' port='5908'/>",
        ] {
            let places = one(text).unwrap();
            let mut again = Places::default();
            for e in document(&format!("<devices>{text}</devices>")).unwrap().elements() {
                assert!(holds(e, &places), "{text}");
                assert!(!holds(e, &Places::default()) || places == Places::default(), "{text}");
                read(&shown(protocol(e).unwrap(), &places, None), &mut again).unwrap();
            }
            assert_eq!(again, places, "{text}");
        }
    }

    #[test]
    fn what_runs_is_shown_where_it_is() {
        let places = one("<graphics type='vnc' websocket='-1' autoport='yes'/>").unwrap();
        let listener = |kind, at: Option<&str>| ScreenListener {
            kind,
            at: at.map(|at| at.parse().unwrap()),
            why: at.is_none().then(|| "taken".to_owned()),
        };
        let all = [
            listener(ScreenKind::Vnc, Some("127.0.0.1:5900")),
            listener(ScreenKind::Websocket, Some("127.0.0.1:5700")),
        ];
        let e = shown(DisplayProtocol::Vnc, &places, Some(&all));
        let text = e.document();
        let wanted = "<graphics type='vnc' port='5900' autoport='yes' websocket='5700' listen='127.0.0.1'>\n  \
            <listen type='address' address='127.0.0.1'/>\n</graphics>";
        assert_eq!(text.trim_end(), wanted);
        for none in [&[][..], &[listener(ScreenKind::Vnc, None)]] {
            let text = shown(DisplayProtocol::Vnc, &places, Some(none)).document();
            assert_eq!(text.trim_end(), "<graphics type='vnc'>\n  <listen type='none'/>\n</graphics>");
        }
    }

    #[test]
    fn what_is_not_there_is_named() {
        for (text, word) in [
            ("<graphics type='vnc' port='80'/>", "graphics port"),
            ("<graphics type='vnc' port='65536'/>", "graphics port"),
            ("<graphics type='vnc' port='5901' websocket='-7'/>", "graphics websocket"),
            ("<graphics type='vnc' listen='localhost'/>", "graphics listen"),
            ("<graphics type='vnc' keymap='klingon'/>", "graphics keymap"),
            ("<graphics type='vnc' sharePolicy='never'/>", "graphics sharePolicy"),
            ("<graphics type='vnc' powerControl='maybe'/>", "graphics powerControl"),
            ("<graphics type='vnc' port='5901'/><graphics type='spice' port='5901'/>", "graphics port"),
            ("<graphics type='vnc' keymap='de'/><graphics type='spice' keymap='fr'/>", "graphics keymap"),
            ("<graphics type='vnc' port='x'/>", "cannot parse 'port'"),
            (
                "<graphics type='vnc' listen='127.0.0.1'><listen type='address' address='::1'/></graphics>",
                "must match",
            ),
        ] {
            let e = one(text).unwrap_err().text;
            assert!(e.contains(word), "{text}: {e}");
        }
    }
}
