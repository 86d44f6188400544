//! Where the screens of virtual machines listen, and how they are served (the keys `screen.*`, whose rows are in
//! [`crate::keys`]). Without a word of it a screen listens nowhere: viewers get it as a stream of the API.

use crate::{Config, Error, Result, display::DisplayProtocol, keys::set, keys_machine::spice};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Layout of the viewer's keyboard.
pub const KEYMAP: &str = "screen.keymap";
/// Where the screen is by SPICE.
pub const SPICE: &str = "screen.spice.listen";
/// Where the screen is by VNC.
pub const VNC: &str = "screen.vnc.listen";
/// Viewers by VNC may shut the machine down, boot it anew and reset it.
pub const POWER: &str = "screen.vnc.power_control";
/// How viewers by VNC share the screen.
pub const SHARE: &str = "screen.vnc.share";
/// The port of VNC on websockets.
pub const WEBSOCKET: &str = "screen.vnc.websocket";

/// Texts of the rows.
pub(crate) mod text {
    pub(crate) const KEYMAP: &str =
        "Layout of the keyboard for viewers that send characters, not keys, such as de or en-us.";
    pub(crate) const SPICE: &str =
        "Where viewers reach the screen by SPICE: as screen.vnc.listen. Needs hardware.spice.";
    pub(crate) const VNC: &str = "Where viewers reach the screen by VNC: ADDRESS:PORT, as 127.0.0.1:5901, [::1]:5901 or 127.0.0.1:auto, \
         which takes a free port from 5900 on. auto alone listens on 127.0.0.1 where the host lets it, else nowhere. \
         The host has to let it: screen_listen in host-policy.toml, and screen_listen_open without a password.";
    pub(crate) const POWER: &str =
        "Viewers by VNC may shut the machine down, boot it anew and reset it without asking the API.";
    pub(crate) const SHARE: &str = "How viewers by VNC share the screen: as they ask for, always, or as many as there are whatever they ask for.";
    pub(crate) const WEBSOCKET: &str =
        "Port of VNC on websockets, at the address of screen.vnc.listen: a number, or auto, from 5700 on.";
}

/// Ports that control may take.
const LOWEST: u16 = 1024;

/// The words of [`SHARE`], by what QEMU and libvirt call them.
pub const SHARES: &[&str] = &["allow-exclusive", "force-shared", "ignore"];

/// Layouts that QEMU has.
pub const KEYMAPS: &[&str] = &[
    "ar", "bepo", "cz", "da", "de", "de-ch", "en-gb", "en-us", "es", "et", "fi", "fo", "fr", "fr-be",
    "fr-ca", "fr-ch", "hr", "hu", "is", "it", "ja", "lt", "lv", "mk", "nl", "no", "pl", "pt", "pt-br", "ru",
    "sl", "sv", "th", "tr",
];

/// What listens for viewers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScreenKind {
    /// VNC.
    Vnc,
    /// VNC on websockets.
    Websocket,
    /// SPICE.
    Spice,
}

impl ScreenKind {
    /// In words.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vnc => "vnc",
            Self::Websocket => "websocket",
            Self::Spice => "spice",
        }
    }

    /// The key that says of it.
    pub fn key(self) -> &'static str {
        match self {
            Self::Vnc => VNC,
            Self::Websocket => WEBSOCKET,
            Self::Spice => SPICE,
        }
    }

    /// What is spoken there.
    pub fn protocol(self) -> DisplayProtocol {
        match self {
            Self::Vnc | Self::Websocket => DisplayProtocol::Vnc,
            Self::Spice => DisplayProtocol::Spice,
        }
    }

    /// The first port that is looked at for one that is free.
    pub fn first_port(self) -> u16 {
        match self {
            Self::Vnc | Self::Spice => 5900,
            Self::Websocket => 5700,
        }
    }
}

/// A port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScreenPort {
    /// One that is free.
    Auto,
    /// This one.
    Fixed(u16),
}

impl ScreenPort {
    fn parse(field: &str, text: &str) -> Result<Self> {
        let wrong = || {
            Error::invalid(
                field,
                format!("{text:?} is no port; write auto, or a number from {LOWEST} to 65535"),
            )
        };
        match text {
            "auto" => Ok(Self::Auto),
            _ => match text.parse() {
                Ok(n) if n >= LOWEST => Ok(Self::Fixed(n)),
                _ => Err(wrong()),
            },
        }
    }
}

impl fmt::Display for ScreenPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Fixed(n) => write!(f, "{n}"),
        }
    }
}

/// Where a screen listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// The address; without a word the loopback of IPv4.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: ScreenPort,
}

impl Listen {
    /// The address that it listens on.
    pub fn at(&self) -> IpAddr {
        self.address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// Nothing is said of where: then a host that does not let it is none to complain about.
    pub fn is_free(&self) -> bool {
        *self == Self { address: None, port: ScreenPort::Auto }
    }

    /// Of `ADDRESS:PORT`, or of a port alone.
    ///
    /// # Errors
    /// Invalid at `field`.
    pub fn parse(field: &str, text: &str) -> Result<Self> {
        let wrong = || {
            let text = format!(
                "{text:?} is no place to listen at; write ADDRESS:PORT such as 127.0.0.1:5901, [::1]:5901 or 127.0.0.1:auto, or auto"
            );
            Error::invalid(field, text)
        };
        let (address, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once("]:").ok_or_else(wrong)?;
                let address: Ipv6Addr = address.parse().map_err(|_| wrong())?;
                (Some(IpAddr::V6(address)), port)
            }
            None => match text.split_once(':') {
                Some((address, port)) => {
                    let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
                    (Some(IpAddr::V4(address)), port)
                }
                None => (None, text),
            },
        };
        if address.is_some_and(|a| a.is_multicast()) {
            return Err(wrong());
        }
        Ok(Self { address, port: ScreenPort::parse(field, port)? })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V4(address)) => write!(f, "{address}:{}", self.port),
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:{}", self.port),
            None => write!(f, "{}", self.port),
        }
    }
}

/// Where the screen of a machine listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Screens {
    /// By VNC.
    pub vnc: Option<Listen>,
    /// By VNC on websockets, at the same address.
    pub websocket: Option<ScreenPort>,
    /// By SPICE.
    pub spice: Option<Listen>,
}

impl Screens {
    /// What an expanded configuration says.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn of(config: &Config) -> Result<Self> {
        let listen = |key: &str| {
            set(config, key).map(|text| Listen::parse(&format!("config.{key}"), text)).transpose()
        };
        let all = Self {
            vnc: listen(VNC)?,
            websocket: set(config, WEBSOCKET)
                .map(|text| ScreenPort::parse(&format!("config.{WEBSOCKET}"), text))
                .transpose()?,
            spice: listen(SPICE)?,
        };
        let wrong = |key: &str, text: &str| Err(Error::invalid(format!("config.{key}"), text));
        if all.websocket.is_some() && all.vnc.is_none() {
            return wrong(WEBSOCKET, "it is at the address of screen.vnc.listen, which is not set");
        }
        let fixed: Vec<_> = all.listeners().filter(|(_, l)| l.port != ScreenPort::Auto).collect();
        for (n, (kind, one)) in fixed.iter().enumerate() {
            if fixed[..n].iter().any(|(_, other)| (other.at(), other.port) == (one.at(), one.port)) {
                let key = if *kind == ScreenKind::Websocket { WEBSOCKET } else { SPICE };
                return wrong(key, "two screens of the machine cannot listen at the same port");
            }
        }
        Ok(all)
    }

    /// Demands the screens that are to listen. A machine that runs may have been started without.
    ///
    /// # Errors
    /// Invalid, naming the key.
    pub fn demand_served(&self, config: &Config) -> Result<()> {
        if self.spice.is_some() && !spice(config) {
            let text = "the machine has no screen by SPICE; set hardware.spice=true too";
            return Err(Error::invalid(format!("config.{SPICE}"), text));
        }
        Ok(())
    }

    /// All of them.
    pub fn listeners(&self) -> impl Iterator<Item = (ScreenKind, Listen)> + use<> {
        let websocket = self.vnc.zip(self.websocket);
        let websocket = websocket.map(|(vnc, port)| Listen { port, ..vnc });
        [(ScreenKind::Vnc, self.vnc), (ScreenKind::Websocket, websocket), (ScreenKind::Spice, self.spice)]
            .into_iter()
            .filter_map(|(kind, listen)| Some((kind, listen?)))
    }

    /// The keys that say it, with the values of those that are set.
    pub fn keys(&self) -> [(&'static str, Option<String>); 3] {
        [
            (VNC, self.vnc.map(|l| l.to_string())),
            (WEBSOCKET, self.websocket.map(|p| p.to_string())),
            (SPICE, self.spice.map(|l| l.to_string())),
        ]
    }
}

/// How a screen is served, as QEMU is told it at the start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ScreenOptions {
    /// One of [`SHARES`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
    /// Viewers may switch the machine off.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub power_control: bool,
    /// One of [`KEYMAPS`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keymap: Option<String>,
}

impl ScreenOptions {
    /// What an expanded configuration says; its values were checked.
    pub fn of(config: &Config) -> Self {
        Self {
            share: set(config, SHARE).filter(|w| SHARES.contains(w)).map(str::to_owned),
            power_control: crate::keys::optional_flag(config, POWER).unwrap_or(false),
            keymap: set(config, KEYMAP).filter(|w| KEYMAPS.contains(w)).map(str::to_owned),
        }
    }

    /// As usual.
    pub fn is_usual(&self) -> bool {
        *self == Self::default()
    }

    /// The keys that say it, with the values of those that are set.
    pub fn keys(&self) -> [(&'static str, Option<String>); 3] {
        [
            (SHARE, self.share.clone()),
            (POWER, self.power_control.then(|| "true".to_owned())),
            (KEYMAP, self.keymap.clone()),
        ]
    }

    /// The keys by which two of them are not the same.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let pairs = self.keys().into_iter().zip(other.keys());
        pairs.filter(|((_, one), (_, two))| one != two).map(|((key, _), _)| key).collect()
    }
}

/// Checks the value of one of these keys.
pub(crate) fn check(name: &str, field: &str, value: &str) -> Result<()> {
    match name {
        VNC | SPICE => Listen::parse(field, value).map(drop),
        WEBSOCKET => ScreenPort::parse(field, value).map(drop),
        _ => Ok(()),
    }
}

/// Where a host lets screens listen, as its administrator says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ScreenGrants {
    /// Addresses; `*`: all.
    pub listen: Vec<String>,
    /// Those of them at which a screen may listen also when it has no password.
    pub open: Vec<String>,
}

impl ScreenGrants {
    /// Nothing.
    pub fn is_empty(&self) -> bool {
        self.listen.is_empty() && self.open.is_empty()
    }

    /// Every address, also without a password: of hosts that are simulated.
    pub fn all() -> Self {
        Self { listen: vec!["*".into()], open: vec!["*".into()] }
    }

    /// What cannot stand in it.
    ///
    /// # Errors
    /// Invalid, naming the list.
    pub fn check(&self) -> Result<()> {
        for (list, all) in [("screen_listen", &self.listen), ("screen_listen_open", &self.open)] {
            if let Some(bad) = all.iter().find(|a| *a != "*" && a.parse::<IpAddr>().is_err()) {
                return Err(Error::invalid(
                    list,
                    format!("{bad:?} is no address; write one such as 127.0.0.1, or *"),
                ));
            }
        }
        Ok(())
    }

    /// May a screen listen there?
    ///
    /// # Errors
    /// Forbidden, with the line that grants it.
    pub fn demand(&self, address: IpAddr) -> Result<()> {
        match granted(&self.listen, address) {
            true => Ok(()),
            false => Err(Error::forbidden(format!(
                "this host lets no screen listen at {address}; its administrator can, with screen_listen = [\"{address}\"] in \
                 host-policy.toml"
            ))),
        }
    }

    /// May one without a password?
    ///
    /// # Errors
    /// Forbidden, with what helps.
    pub fn demand_open(&self, address: IpAddr) -> Result<()> {
        match granted(&self.open, address) {
            true => Ok(()),
            false => Err(Error::forbidden(format!(
                "a screen without a password does not listen at {address}: everybody who reaches that address could use it; give the \
                 screen a password, or have screen_listen_open = [\"{address}\"] in host-policy.toml"
            ))),
        }
    }
}

fn granted(list: &[String], address: IpAddr) -> bool {
    list.iter().any(|a| a == "*" || a.parse::<IpAddr>() == Ok(address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(pairs: &[(&str, &str)]) -> Result<Screens> {
        let config = pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let screens = Screens::of(&config)?;
        screens.demand_served(&config).map(|()| screens)
    }

    #[test]
    fn what_is_written_is_read_again() {
        assert_eq!(of(&[]).unwrap(), Screens::default());
        let all = [
            (VNC, "127.0.0.1:5901"),
            (WEBSOCKET, "auto"),
            (SPICE, "[::1]:auto"),
            (crate::keys_machine::SPICE, "true"),
        ];
        let screens = of(&all).unwrap();
        let again: Vec<_> = screens.keys().into_iter().map(|(k, v)| (k, v.unwrap())).collect();
        let again: Vec<_> = again.iter().map(|(k, v)| (*k, v.as_str())).collect();
        assert_eq!(again, all[..3]);
        let listeners: Vec<_> = screens.listeners().map(|(kind, l)| (kind, l.to_string())).collect();
        let wanted = [
            (ScreenKind::Vnc, "127.0.0.1:5901"),
            (ScreenKind::Websocket, "127.0.0.1:auto"),
            (ScreenKind::Spice, "[::1]:auto"),
        ];
        assert_eq!(listeners, wanted.map(|(kind, text)| (kind, text.to_owned())));
        for (text, free) in [("auto", true), ("5901", false), ("127.0.0.1:auto", false)] {
            let listen = Listen::parse("x", text).unwrap();
            assert_eq!((listen.is_free(), listen.to_string().as_str()), (free, text));
            assert_eq!(listen.at(), IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        let keys = [(SHARE, "force-shared"), (POWER, "true"), (KEYMAP, "de")];
        let options = ScreenOptions::of(&keys.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect());
        assert_eq!(options.keys().map(|(k, v)| (k, v.unwrap())), keys.map(|(k, v)| (k, v.to_owned())));
        assert_eq!(options.differences(&ScreenOptions::default()), [SHARE, POWER, KEYMAP]);
    }

    #[test]
    fn what_cannot_be_names_its_key() {
        for (pairs, key) in [
            (&[(VNC, "localhost:5900")][..], VNC),
            (&[(VNC, "::1:5900")], VNC),
            (&[(VNC, "[::1]")], VNC),
            (&[(VNC, "127.0.0.1:80")], VNC),
            (&[(VNC, "127.0.0.1:65536")], VNC),
            (&[(VNC, "224.0.0.1:5900")], VNC),
            (&[(VNC, "some")], VNC),
            (&[(WEBSOCKET, "auto")], WEBSOCKET),
            (&[(VNC, "5900"), (WEBSOCKET, "5900")], WEBSOCKET),
            (&[(SPICE, "auto")], SPICE),
            (&[(VNC, "5900"), (SPICE, "5900"), (crate::keys_machine::SPICE, "true")], SPICE),
        ] {
            assert_eq!(of(pairs).unwrap_err().field, Some(format!("config.{key}")), "{pairs:?}");
        }
    }

    #[test]
    fn a_host_grants_what_is_said_and_no_more() {
        let [one, other]: [IpAddr; 2] = ["127.0.0.1", "::1"].map(|a| a.parse().unwrap());
        let none = ScreenGrants::default();
        assert!(none.demand(one).unwrap_err().message.contains("screen_listen = [\"127.0.0.1\"]"));
        let some = ScreenGrants { listen: vec!["127.0.0.1".into()], ..none };
        some.demand(one).unwrap();
        assert!(some.demand(other).is_err());
        assert!(some.demand_open(one).unwrap_err().message.contains("screen_listen_open"));
        ScreenGrants::all().demand(other).unwrap();
        ScreenGrants::all().demand_open(other).unwrap();
        let bad = ScreenGrants { listen: vec!["eth0".into()], open: vec![] };
        assert_eq!(bad.check().unwrap_err().field.as_deref(), Some("screen_listen"));
        ScreenGrants::all().check().unwrap();
    }
}
