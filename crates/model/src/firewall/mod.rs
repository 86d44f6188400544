//! The firewall's vocabulary: network ACLs and address sets in Incus' grammar, forwards, and what of them reaches a host.
//!
//! One model for both ends: the host renders its nft text from these types, and [`evaluate`] decides about a packet in
//! words from the same. Rules have no order of their own: in each direction all drops of all ACLs come first, then all
//! rejects, then what is allowed, then the default action.

mod address;
pub mod evaluate;
mod forward;

pub use address::{AddressRange, merge};
pub use forward::{ForwardPort, ForwardSpec, ForwardTarget, NetworkForward};

use crate::{AclId, AddressSetId, Config, Error, Name, ProjectId, Result, keys::parse_bool};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Which way, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Towards the guest.
    Ingress,
    /// From the guest.
    Egress,
}

impl Direction {
    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// What happens to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Discarded silently.
    Drop,
    /// Discarded, and the sender is told.
    Reject,
    /// Passes; answers must be allowed by themselves.
    AllowStateless,
    /// Passes, and so do the answers.
    Allow,
}

impl Action {
    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Reject => "reject",
            Self::AllowStateless => "allow-stateless",
            Self::Allow => "allow",
        }
    }
    /// The packet passes.
    pub fn passes(self) -> bool {
        matches!(self, Self::Allow | Self::AllowStateless)
    }
    /// In the order in which rules are looked at.
    pub const ORDER: [Self; 4] = [Self::Drop, Self::Reject, Self::AllowStateless, Self::Allow];
}

/// A rule as users write it; all texts may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct AclRule {
    /// `allow`, `allow-stateless`, `drop`, `reject`.
    pub action: String,
    /// Comma-separated addresses, subnets, ranges; of ingress rules also `@internal`, `@external`, ACLs, `$` address sets.
    pub source: String,
    /// The same for the other end; selectors in egress rules.
    pub destination: String,
    /// `tcp`, `udp`, `icmp4`, `icmp6` or nothing.
    pub protocol: String,
    /// Comma-separated ports and ranges.
    pub source_port: String,
    /// Comma-separated ports and ranges.
    pub destination_port: String,
    /// Number.
    pub icmp_type: String,
    /// Number.
    pub icmp_code: String,
    /// User's text.
    pub description: String,
    /// `enabled`, `disabled`, `logged`.
    pub state: String,
}

/// A network ACL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAcl {
    /// Reference.
    pub id: AclId,
    /// Project that owns it.
    pub project: ProjectId,
    /// Name.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// `user.*`.
    #[serde(default)]
    pub config: Config,
    /// Rules for what comes to guests.
    #[serde(default)]
    pub ingress: Vec<AclRule>,
    /// Rules for what guests send.
    #[serde(default)]
    pub egress: Vec<AclRule>,
    /// Grows with each change.
    pub spec_version: u64,
}

impl NetworkAcl {
    /// The typed form, disabled rules left out.
    ///
    /// # Errors
    /// Invalid, naming the rule and field.
    pub fn parse(&self) -> Result<AclSpec> {
        let rules = |direction: Direction, rules: &[AclRule]| -> Result<Vec<RuleSpec>> {
            let parsed = rules.iter().enumerate().map(|(n, r)| r.parse(direction, n));
            Ok(parsed.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
        };
        Ok(AclSpec {
            id: self.id,
            name: self.name.to_string(),
            ingress: rules(Direction::Ingress, &self.ingress)?,
            egress: rules(Direction::Egress, &self.egress)?,
        })
    }
}

/// A set of addresses that rules name as `$NAME`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressSet {
    /// Reference.
    pub id: AddressSetId,
    /// Project that owns it.
    pub project: ProjectId,
    /// Name.
    pub name: Name,
    /// User's text.
    #[serde(default)]
    pub description: String,
    /// `user.*`.
    #[serde(default)]
    pub config: Config,
    /// Addresses, subnets and ranges.
    #[serde(default)]
    pub addresses: Vec<String>,
    /// Grows with each change.
    pub spec_version: u64,
}

impl AddressSet {
    /// The typed form.
    ///
    /// # Errors
    /// Invalid, naming the element.
    pub fn parse(&self) -> Result<AddressSetSpec> {
        let ranges = self.addresses.iter().enumerate().map(|(n, a)| {
            a.trim().parse().map_err(|e: Error| Error::invalid(format!("addresses[{n}]"), e.message))
        });
        Ok(AddressSetSpec {
            id: self.id,
            name: self.name.to_string(),
            ranges: ranges.collect::<Result<_>>()?,
        })
    }
}

/// Name of an ACL or address set: Incus takes a DNS-like name that is not mistaken for an address or selector.
///
/// # Errors
/// Invalid.
pub fn object_name(field: &str, text: &str) -> Result<Name> {
    let name = Name::parse(field, text)?;
    if !text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Err(Error::invalid(field, format!("{text:?} must begin with a letter")));
    }
    Ok(name)
}

/// `tcp`, `udp`, …
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP.
    Icmp4,
    /// ICMPv6.
    Icmp6,
}

/// Who sends or receives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Subject {
    /// An address, subnet or range.
    Range(AddressRange),
    /// The guests to whose NICs this ACL applies.
    Acl(String),
    /// An address set.
    Set(String),
    /// The network's own subnets.
    Internal,
    /// All else.
    External,
}

impl FromStr for Subject {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "@internal" | "#internal" => return Ok(Self::Internal),
            "@external" | "#external" => return Ok(Self::External),
            _ => {}
        }
        if let Some(set) = s.strip_prefix('$') {
            return object_name("set", set).map(|n| Self::Set(n.to_string()));
        }
        if s.starts_with(['@', '#']) {
            return Err(Error::invalid("subject", format!("{s:?} is neither @internal nor @external")));
        }
        if s.starts_with(|c: char| c.is_ascii_digit()) || s.contains(':') || s.contains('/') {
            return s.parse().map(Self::Range);
        }
        object_name("acl", s).map(|n| Self::Acl(n.to_string())).map_err(|_| {
            Error::invalid(
                "subject",
                format!("{s:?} is no address, subnet, range, selector, ACL or $address-set"),
            )
        })
    }
}

impl TryFrom<String> for Subject {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Subject> for String {
    fn from(s: Subject) -> Self {
        s.to_string()
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(r) => r.fmt(f),
            Self::Acl(n) => f.write_str(n),
            Self::Set(n) => write!(f, "${n}"),
            Self::Internal => f.write_str("@internal"),
            Self::External => f.write_str("@external"),
        }
    }
}

fn none<T>(v: &[T]) -> bool {
    v.is_empty()
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn no(b: &bool) -> bool {
    !*b
}

/// A rule, parsed. Empty lists match everything.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RuleSpec {
    /// Position among the ACL's rules of its direction, as written, from 0.
    pub number: u32,
    /// What happens.
    pub action: Action,
    /// Log it.
    #[serde(default, skip_serializing_if = "no")]
    pub logged: bool,
    /// Only this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// Senders.
    #[serde(default, skip_serializing_if = "none")]
    pub source: Vec<Subject>,
    /// Receivers.
    #[serde(default, skip_serializing_if = "none")]
    pub destination: Vec<Subject>,
    /// Ports of the sender, inclusive ranges.
    #[serde(default, skip_serializing_if = "none")]
    pub source_ports: Vec<(u16, u16)>,
    /// Ports of the receiver, inclusive ranges.
    #[serde(default, skip_serializing_if = "none")]
    pub destination_ports: Vec<(u16, u16)>,
    /// Type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp_type: Option<u8>,
    /// Code.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icmp_code: Option<u8>,
}

/// An ACL for a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AclSpec {
    /// Reference.
    pub id: AclId,
    /// Name, for logs and explanations.
    pub name: String,
    /// Rules for what comes to guests.
    pub ingress: Vec<RuleSpec>,
    /// Rules for what guests send.
    pub egress: Vec<RuleSpec>,
}

impl AclSpec {
    /// Rules of a direction.
    pub fn rules(&self, direction: Direction) -> &[RuleSpec] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// An address set for a host.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AddressSetSpec {
    /// Reference.
    pub id: AddressSetId,
    /// Name.
    pub name: String,
    /// Its addresses.
    pub ranges: Vec<AddressRange>,
}

/// What happens to what no rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DefaultAction {
    /// What.
    pub action: Action,
    /// Log it.
    pub logged: bool,
}

/// Which ACLs apply to a NIC or network, by name; their order does not matter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Policy {
    /// Names.
    pub acls: Vec<String>,
    /// For what comes to guests.
    pub ingress: DefaultAction,
    /// For what guests send.
    pub egress: DefaultAction,
}

impl Policy {
    /// The default of a direction.
    pub fn default_of(&self, direction: Direction) -> DefaultAction {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }
}

/// Reads `security.acls` and `security.acls.default.*` of a network or NIC; `prefix` is put before keys in errors.
///
/// # Errors
/// Invalid.
pub fn policy<'a>(
    prefix: &str,
    get: &dyn Fn(&str) -> Option<&'a str>,
    default: Action,
) -> Result<Option<Policy>> {
    let side = |direction: &str| -> Result<DefaultAction> {
        let key = format!("security.acls.default.{direction}.action");
        let action = match get(&key) {
            None => default,
            Some("allow") => Action::Allow,
            Some("drop") => Action::Drop,
            Some("reject") => Action::Reject,
            Some(v) => {
                return Err(Error::invalid(
                    format!("{prefix}{key}"),
                    format!("{v:?} is none of \"allow\", \"drop\", \"reject\""),
                ));
            }
        };
        let key = format!("security.acls.default.{direction}.logged");
        let logged = get(&key).map_or(Ok(false), |v| parse_bool(&format!("{prefix}{key}"), v))?;
        Ok(DefaultAction { action, logged })
    };
    let (ingress, egress) = (side("ingress")?, side("egress")?);
    let mut acls = vec![];
    for word in get("security.acls").unwrap_or_default().split(',').map(str::trim).filter(|w| !w.is_empty()) {
        acls.push(object_name(&format!("{prefix}security.acls"), word)?.to_string());
    }
    acls.sort();
    acls.dedup();
    Ok((!acls.is_empty()).then_some(Policy { acls, ingress, egress }))
}

/// Ports and ranges, comma-separated.
pub(crate) fn ports(field: &str, text: &str) -> Result<Vec<(u16, u16)>> {
    let wrong = |w: &str| {
        Error::invalid(field, format!("{w:?} is not a port or range of ports, such as 80 or 8000-8010"))
    };
    text.split(',')
        .map(str::trim)
        .filter(|w| !w.is_empty())
        .map(|w| {
            let (a, b) = w.split_once('-').unwrap_or((w, w));
            let port = |p: &str| p.trim().parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(|| wrong(w));
            let (a, b) = (port(a)?, port(b)?);
            if a <= b { Ok((a, b)) } else { Err(wrong(w)) }
        })
        .collect()
}

impl AclRule {
    /// The typed form; `None` for a disabled rule, which is checked all the same.
    ///
    /// # Errors
    /// Invalid, naming `DIRECTION[N].FIELD`.
    pub fn parse(&self, direction: Direction, n: usize) -> Result<Option<RuleSpec>> {
        let field = |f: &str| format!("{}[{n}].{f}", direction.as_str());
        let action = Action::ORDER.into_iter().find(|a| a.as_str() == self.action).ok_or_else(|| {
            Error::invalid(
                field("action"),
                format!("{:?} is none of \"allow\", \"allow-stateless\", \"drop\", \"reject\"", self.action),
            )
        })?;
        let (enabled, logged) = match self.state.as_str() {
            "" | "enabled" => (true, false),
            "logged" => (true, true),
            "disabled" => (false, false),
            v => {
                return Err(Error::invalid(
                    field("state"),
                    format!("{v:?} is none of \"enabled\", \"disabled\", \"logged\""),
                ));
            }
        };
        let protocol = match self.protocol.as_str() {
            "" => None,
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            "icmp4" => Some(Protocol::Icmp4),
            "icmp6" => Some(Protocol::Icmp6),
            v => {
                return Err(Error::invalid(
                    field("protocol"),
                    format!("{v:?} is none of \"tcp\", \"udp\", \"icmp4\", \"icmp6\""),
                ));
            }
        };
        let subjects = |name: &str, text: &str, selectors: bool| -> Result<Vec<Subject>> {
            text.split(',')
                .map(str::trim)
                .filter(|w| !w.is_empty())
                .map(|w| {
                    let subject: Subject =
                        w.parse().map_err(|e: Error| Error::invalid(field(name), e.message))?;
                    if !selectors && !matches!(subject, Subject::Range(_) | Subject::Set(_)) {
                        return Err(Error::invalid(
                            field(name),
                            format!(
                                "{w:?} can stand as the {} of {} rules only",
                                if direction == Direction::Ingress { "source" } else { "destination" },
                                direction.as_str()
                            ),
                        ));
                    }
                    Ok(subject)
                })
                .collect()
        };
        let has_ports = matches!(protocol, Some(Protocol::Tcp | Protocol::Udp));
        let is_icmp = matches!(protocol, Some(Protocol::Icmp4 | Protocol::Icmp6));
        for (name, text) in [("source_port", &self.source_port), ("destination_port", &self.destination_port)]
        {
            if !text.is_empty() && !has_ports {
                return Err(Error::invalid(field(name), "ports need protocol \"tcp\" or \"udp\""));
            }
        }
        let number = |name: &str, text: &str| -> Result<Option<u8>> {
            if text.is_empty() {
                return Ok(None);
            }
            if !is_icmp {
                return Err(Error::invalid(field(name), "it needs protocol \"icmp4\" or \"icmp6\""));
            }
            text.parse()
                .map(Some)
                .map_err(|_| Error::invalid(field(name), format!("{text:?} is not a number from 0 to 255")))
        };
        let rule = RuleSpec {
            number: n as u32,
            action,
            logged,
            protocol,
            source: subjects("source", &self.source, direction == Direction::Ingress)?,
            destination: subjects("destination", &self.destination, direction == Direction::Egress)?,
            source_ports: ports(&field("source_port"), &self.source_port)?,
            destination_ports: ports(&field("destination_port"), &self.destination_port)?,
            icmp_type: number("icmp_type", &self.icmp_type)?,
            icmp_code: number("icmp_code", &self.icmp_code)?,
        };
        if rule.icmp_code.is_some() && rule.icmp_type.is_none() {
            return Err(Error::invalid(field("icmp_type"), "icmp_code needs icmp_type"));
        }
        rule.check_families(&field)?;
        Ok(enabled.then_some(rule))
    }
}

impl RuleSpec {
    /// A rule that can match nothing, because its parts are of different IP versions, is a mistake.
    fn check_families(&self, field: &dyn Fn(&str) -> String) -> Result<()> {
        let could = |list: &[Subject], v4: bool| {
            list.is_empty() || list.iter().any(|s| !matches!(s, Subject::Range(r) if r.is_v4() != v4))
        };
        let of = |v4: bool| {
            could(&self.source, v4)
                && could(&self.destination, v4)
                && self.protocol != Some(if v4 { Protocol::Icmp6 } else { Protocol::Icmp4 })
        };
        if of(true) || of(false) {
            return Ok(());
        }
        let at = if self.destination.is_empty() { "source" } else { "destination" };
        Err(Error::invalid(
            field(at),
            "source, destination and protocol are of different IP versions: nothing would match",
        ))
    }

    /// Names of ACLs and address sets that it refers to.
    pub fn references(&self) -> impl Iterator<Item = &Subject> {
        self.source.iter().chain(&self.destination).filter(|s| matches!(s, Subject::Acl(_) | Subject::Set(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(pairs: &[(&str, &str)]) -> AclRule {
        let mut value = serde_json::json!({});
        for (k, v) in pairs {
            value[*k] = (*v).into();
        }
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn rules_parse() {
        let r = rule(&[
            ("action", "allow"),
            ("source", "@external, web, $office, 10.0.0.0/8, 10.1.0.1-10.1.0.9, fd42::/64"),
            ("protocol", "tcp"),
            ("destination_port", "22, 8000-8010"),
            ("state", "logged"),
        ])
        .parse(Direction::Ingress, 3)
        .unwrap()
        .unwrap();
        assert!(r.logged && r.source.len() == 6 && r.destination_ports == [(22, 22), (8000, 8010)]);
        assert_eq!(r.references().count(), 2);
        let text = serde_json::to_string(&r).unwrap();
        assert!(text.contains("\"$office\"") && !text.contains("icmp"), "{text}");
        assert_eq!(serde_json::from_str::<RuleSpec>(&text).unwrap(), r);
        assert!(
            rule(&[("action", "drop"), ("state", "disabled")]).parse(Direction::Egress, 0).unwrap().is_none()
        );
    }

    #[test]
    fn wrong_rules_are_named() {
        for (pairs, field) in [
            (&[("action", "maybe")][..], "action"),
            (&[("action", "allow"), ("state", "on")], "state"),
            (&[("action", "allow"), ("protocol", "sctp")], "protocol"),
            (&[("action", "allow"), ("destination", "web")], "destination"),
            (&[("action", "allow"), ("source", "10.0.0.0/99")], "source"),
            (&[("action", "allow"), ("source", "10.0.0.9-10.0.0.1")], "source"),
            (&[("action", "allow"), ("source", "@all")], "source"),
            (&[("action", "allow"), ("source", "1; drop")], "source"),
            (&[("action", "allow"), ("destination_port", "80")], "destination_port"),
            (&[("action", "allow"), ("protocol", "tcp"), ("destination_port", "0")], "destination_port"),
            (&[("action", "allow"), ("protocol", "tcp"), ("source_port", "9-8")], "source_port"),
            (&[("action", "allow"), ("icmp_type", "8")], "icmp_type"),
            (&[("action", "allow"), ("protocol", "icmp4"), ("icmp_code", "0")], "icmp_type"),
            (&[("action", "allow"), ("protocol", "icmp4"), ("icmp_type", "300")], "icmp_type"),
            (&[("action", "allow"), ("protocol", "icmp6"), ("source", "10.0.0.1")], "source"),
            (&[("action", "allow"), ("source", "fd42::1"), ("destination", "10.0.0.1")], "destination"),
        ] {
            let e = rule(pairs).parse(Direction::Ingress, 2).unwrap_err();
            assert_eq!(e.field.as_deref(), Some(&*format!("ingress[2].{field}")), "{pairs:?}: {e}");
        }
    }

    #[test]
    fn policies() {
        let get = |k: &str| match k {
            "security.acls" => Some("web, db,web"),
            "security.acls.default.egress.action" => Some("allow"),
            _ => None,
        };
        let p = policy("config.", &get, Action::Reject).unwrap().unwrap();
        assert_eq!(p.acls, ["db", "web"]);
        assert_eq!((p.ingress.action, p.egress.action), (Action::Reject, Action::Allow));
        assert!(policy("", &|_| None, Action::Drop).unwrap().is_none());
        let e =
            policy("devices.eth0.", &|k| (k == "security.acls").then_some("1x"), Action::Drop).unwrap_err();
        assert_eq!(e.field.as_deref(), Some("devices.eth0.security.acls"));
    }
}
