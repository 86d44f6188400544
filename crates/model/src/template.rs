//! Templates of images: files of a guest that are made anew of its name and configuration when it is created, copied,
//! renamed or started. What an image brings and users may edit for each instance (`metadata.yaml` and `templates/` of
//! Incus' image format). Not the rendering, which is the engine's.

use crate::{Config, Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Bytes of all rules and templates of an instance together: they travel in the plans of sagas.
pub const MAX_BYTES: usize = 32 << 10;
/// Rules, and templates.
const MAX_COUNT: usize = 64;
const MAX_PATH: usize = 1024;

/// When a template is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// At the first start of an instance of an image.
    Create,
    /// At the first start of a copy.
    Copy,
    /// At the first start under another name.
    Rename,
    /// At each start.
    Start,
}

impl Trigger {
    /// Incus' word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Copy => "copy",
            Self::Rename => "rename",
            Self::Start => "start",
        }
    }

    /// Reads Incus' word.
    ///
    /// # Errors
    /// Invalid at `field`.
    pub fn parse(field: &str, s: &str) -> Result<Self> {
        let all = [Self::Create, Self::Copy, Self::Rename, Self::Start];
        all.into_iter().find(|t| t.as_str() == s).ok_or_else(|| {
            Error::invalid(field, format!("{s:?} is no such moment; use create, copy, rename or start"))
        })
    }
}

/// How one file of the guest is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateRule {
    /// When.
    pub when: Vec<Trigger>,
    /// Name of the template.
    pub template: String,
    /// Not where there is such a file already.
    #[serde(default)]
    pub create_only: bool,
    /// What the template can look up as `properties`.
    #[serde(default)]
    pub properties: Config,
    /// Owner of a file that is made; 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// Group of a file that is made; 0 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
    /// Permission bits of a file that is made; 0644 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// Rules with their templates.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Templates {
    /// Rules by the path in the guest.
    #[serde(default)]
    pub rules: BTreeMap<String, TemplateRule>,
    /// Texts by name.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
}

impl Templates {
    /// Neither rules nor templates.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty() && self.files.is_empty()
    }

    /// Checks names, paths and sizes.
    ///
    /// # Errors
    /// Invalid at a field below `field` (`""`: at the top).
    pub fn check(&self, field: &str) -> Result<()> {
        let below = |name: &str| if field.is_empty() { name.to_owned() } else { format!("{field}.{name}") };
        for (path, rule) in &self.rules {
            let at = below(&format!("templates.{path}"));
            check_path(&at, path)?;
            check_name(&format!("{at}.template"), &rule.template)?;
            if rule.mode.is_some_and(|m| m > 0o7777) {
                return Err(Error::invalid(format!("{at}.mode"), "permission bits are at most 7777 (octal)"));
            }
        }
        for name in self.files.keys() {
            check_name(&below("path"), name)?;
        }
        let texts = self.files.iter().map(|(k, v)| k.len() + v.len());
        let rules = self.rules.iter().map(|(path, rule)| {
            let properties: usize = rule.properties.iter().map(|(k, v)| k.len() + v.len()).sum();
            path.len() + rule.template.len() + properties + 64
        });
        if self.rules.len() > MAX_COUNT
            || self.files.len() > MAX_COUNT
            || texts.chain(rules).sum::<usize>() > MAX_BYTES
        {
            let text = format!(
                "there are more than {MAX_COUNT} templates, or more than {} KiB of them; make them fewer or smaller",
                MAX_BYTES >> 10
            );
            return Err(Error::invalid(below("templates"), text));
        }
        Ok(())
    }
}

fn check_path(field: &str, path: &str) -> Result<()> {
    let bad = |why: &str| Err(Error::invalid(field, format!("{path:?} {why}")));
    if !path.starts_with('/') || path.ends_with('/') {
        return bad("is not the absolute path of a file");
    }
    if path.len() > MAX_PATH || path.chars().any(char::is_control) {
        return bad("is too long, or has a control character");
    }
    if path.split('/').any(|part| matches!(part, "." | "..")) {
        return bad("has a . or .. in it");
    }
    Ok(())
}

/// Checks the name of a template.
///
/// # Errors
/// Invalid at `field`.
pub fn check_name(field: &str, name: &str) -> Result<()> {
    let odd = name.contains('/') || name.chars().any(char::is_control) || matches!(name, "" | "." | "..");
    if odd || name.len() > 64 {
        let text =
            format!("{name:?} is not the name of a template: one without a slash, such as hostname.tpl");
        return Err(Error::invalid(field, text));
    }
    Ok(())
}

/// A text, or what YAML makes of one that stands there without quotes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    /// A text.
    Text(String),
    /// A number.
    Number(i64),
    /// A truth value.
    Flag(bool),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(s) => f.write_str(s),
            Self::Number(n) => write!(f, "{n}"),
            Self::Flag(b) => write!(f, "{b}"),
        }
    }
}

/// A rule as it stands in `metadata.yaml` and in Incus' API.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenRule {
    /// `create`, `copy`, `rename`, `start`.
    #[serde(default)]
    pub when: Option<Vec<String>>,
    /// Not where there is such a file already.
    #[serde(default)]
    pub create_only: bool,
    /// Name of the template.
    #[serde(default)]
    pub template: String,
    /// What the template can look up.
    #[serde(default)]
    pub properties: Option<BTreeMap<String, Scalar>>,
    /// Owner, decimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<Scalar>,
    /// Group, decimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<Scalar>,
    /// Permission bits, octal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Scalar>,
}

impl WrittenRule {
    /// Reads it.
    ///
    /// # Errors
    /// Invalid at a field below `field`.
    pub fn read(self, field: &str) -> Result<TemplateRule> {
        let number = |name: &str, value: Option<Scalar>, radix: u32| -> Result<Option<u32>> {
            let Some(text) = value.map(|v| v.to_string()).filter(|t| !t.is_empty()) else { return Ok(None) };
            u32::from_str_radix(&text, radix).map(Some).map_err(|_| {
                let what = if radix == 8 { "an octal mode, such as 0644" } else { "an id" };
                Error::invalid(format!("{field}.{name}"), format!("{text:?} is not {what}"))
            })
        };
        let when = self.when.unwrap_or_default();
        Ok(TemplateRule {
            when: when.iter().map(|w| Trigger::parse(&format!("{field}.when"), w)).collect::<Result<_>>()?,
            template: self.template,
            create_only: self.create_only,
            properties: self.properties.into_iter().flatten().map(|(k, v)| (k, v.to_string())).collect(),
            uid: number("uid", self.uid, 10)?,
            gid: number("gid", self.gid, 10)?,
            mode: number("mode", self.mode, 8)?,
        })
    }
}

impl From<&TemplateRule> for WrittenRule {
    fn from(rule: &TemplateRule) -> Self {
        let id = |n: u32| Scalar::Text(n.to_string());
        Self {
            when: Some(rule.when.iter().map(|t| t.as_str().to_owned()).collect()),
            create_only: rule.create_only,
            template: rule.template.clone(),
            properties: Some(
                rule.properties.iter().map(|(k, v)| (k.clone(), Scalar::Text(v.clone()))).collect(),
            ),
            uid: rule.uid.map(id),
            gid: rule.gid.map(id),
            mode: rule.mode.map(|m| Scalar::Text(format!("{m:04o}"))),
        }
    }
}

/// Reads the rules of a `metadata.yaml`, or of a request.
///
/// # Errors
/// Invalid at a field below `field` (`""`: at the top).
pub fn read_rules(
    field: &str,
    written: BTreeMap<String, WrittenRule>,
) -> Result<BTreeMap<String, TemplateRule>> {
    let dot = if field.is_empty() { "" } else { "." };
    let read = |(path, rule): (String, WrittenRule)| {
        let rule = rule.read(&format!("{field}{dot}templates.{path}"))?;
        Ok((path, rule))
    };
    written.into_iter().map(read).collect()
}

/// Rules as they are written.
pub fn write_rules(rules: &BTreeMap<String, TemplateRule>) -> BTreeMap<&str, WrittenRule> {
    rules.iter().map(|(path, rule)| (path.as_str(), rule.into())).collect()
}

/// What is kept of an instance's image with the instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceMetadata {
    /// In the kernel's name, such as `x86_64`.
    pub architecture: String,
    /// When the image was made, in seconds since the epoch.
    #[serde(default)]
    pub creation_date: i64,
    /// When the image may go, in seconds since the epoch; 0 is never.
    #[serde(default)]
    pub expiry_date: i64,
    /// `os`, `release`, …
    #[serde(default)]
    pub properties: Config,
    /// Files that are made anew.
    #[serde(default)]
    pub templates: Templates,
    /// Grows with each change; base of the ETag.
    #[serde(default)]
    pub version: u64,
}

impl InstanceMetadata {
    /// Checks what a user wrote.
    ///
    /// # Errors
    /// Invalid by field.
    pub fn check(&self) -> Result<()> {
        let bytes: usize = self.properties.iter().map(|(k, v)| k.len() + v.len()).sum();
        if bytes > MAX_BYTES || self.architecture.len() > 64 {
            return Err(Error::invalid("properties", "these are too many or too long properties"));
        }
        self.templates.check("")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(path: &str, template: &str) -> Templates {
        let rule =
            TemplateRule { when: vec![Trigger::Start], template: template.into(), ..Default::default() };
        Templates {
            rules: [(path.to_owned(), rule)].into(),
            files: [(template.to_owned(), "x".to_owned())].into(),
        }
    }

    #[test]
    fn what_leads_elsewhere_or_is_too_much_is_refused() {
        one("/etc/hosts", "hosts.tpl").check("").unwrap();
        for (path, template) in [
            ("etc/hosts", "a"),
            ("/", "a"),
            ("/etc/", "a"),
            ("/etc/../../x", "a"),
            ("/a\0b", "a"),
            ("/a", ""),
            ("/a", "../a"),
            ("/a", ".."),
        ] {
            let e = one(path, template).check("metadata").unwrap_err();
            assert!(e.field.as_deref().is_some_and(|f| f.starts_with("metadata.")), "{path} {template}: {e}");
        }
        let mut much = one("/a", "a");
        much.files.insert("b".into(), "x".repeat(MAX_BYTES));
        assert!(much.check("").unwrap_err().message.contains("32 KiB"));
        let mut mode = one("/a", "a");
        mode.rules.get_mut("/a").unwrap().mode = Some(0o10000);
        assert!(mode.check("").unwrap_err().message.contains("7777"));
        let written = WrittenRule {
            when: Some(vec!["start".into()]),
            mode: Some(Scalar::Number(600)),
            uid: Some(Scalar::Text(String::new())),
            ..Default::default()
        };
        let rule = written.clone().read("x").unwrap();
        assert_eq!((rule.mode, rule.uid, &rule.when), (Some(0o600), None, &vec![Trigger::Start]));
        assert_eq!(WrittenRule::from(&rule).read("x").unwrap(), rule);
        let wrong = WrittenRule { mode: Some(Scalar::Text("9".into())), ..written };
        assert!(wrong.read("x").unwrap_err().message.contains("octal"));
        assert!(Trigger::parse("when", "boot").unwrap_err().message.contains("rename"));
        assert_eq!(Trigger::parse("when", "copy").unwrap(), Trigger::Copy);
    }
}
