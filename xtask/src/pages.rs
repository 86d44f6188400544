//! Pages of the reference that are made of more than one table: the keys of devices, and the host's policy, whose structs say in
//! their own documentation what each field grants.

use crate::root;
use karst_model::device::DEVICE_KEYS;
use std::{fs, path::PathBuf};

/// Where the structs of the policy are.
const HOST: &str = "crates/agent-host/src";

/// The keys of devices that are neither disks, NICs nor ports.
pub fn device_keys() -> String {
    let mut text = String::from(
        "# Configuration keys of other devices\n\nMade of `crates/model/src/device/other_keys.rs` by `cargo xtask gen`.\n\n\
         [Disks](disk-keys.md), [NICs](nic-keys.md) and [ports](port-keys.md) have pages of their own. A device of type `none` has no keys: it takes away \
         the one of its name that a profile gives. What a host has to grant stands in its [host-policy.toml](host-policy.md).\n",
    );
    for (kind, what, keys) in DEVICE_KEYS {
        text.push_str(&format!("\n## {kind}\n\n{what}\n\n| key | what it does |\n|---|---|\n"));
        for (name, what) in *keys {
            text.push_str(&format!("| `{name}` | {what} |\n"));
        }
    }
    text
}

/// The page of `host-policy.toml`.
///
/// # Errors
/// What of the structs it does not understand: a page that leaves something out would be believed.
pub fn host_policy() -> Result<String, String> {
    let mut text = String::from(
        "# host-policy.toml\n\nMade of `crates/agent-host/src/policy.rs` by `cargo xtask gen`.\n\n\
         What a host grants its guests and administrators beyond what every guest has. The file is in `/etc/karst`, or else in the \
         directory of the daemon; the first of them that has one counts. It belongs to root, and nobody else may write it. The daemon \
         reads it when it starts, and does not start where it says something that is not known. Without the file nothing is granted.\n\n\
         | field | is | without it | what it grants |\n|---|---|---|---|\n",
    );
    let sources = sources()?;
    let mut tables = vec![];
    for field in fields(&sources, "HostPolicy")? {
        match field.kind() {
            Some((is, without)) => {
                text.push_str(&format!("| `{}` | {is} | {without} | {} |\n", field.name, field.text));
            }
            None => tables.push(field),
        }
    }
    for table in tables {
        let of = table.of.rsplit("::").next().unwrap_or_default();
        text.push_str(&format!("\n## [{}]\n\n{}\n\n", table.name, table.text));
        text.push_str("| field | is | without it | what it says |\n|---|---|---|---|\n");
        for field in fields(&sources, of)? {
            let (is, none) = field.kind().ok_or_else(|| {
                format!(
                    "{}.{} is of type {}, which the page of the policy has no words for",
                    table.name, field.name, field.of
                )
            })?;
            let without = default_of(&sources, of, &field.name).unwrap_or_else(|| none.to_owned());
            text.push_str(&format!("| `{}` | {is} | {without} | {} |\n", field.name, field.text));
        }
    }
    Ok(text)
}

/// A field as the source has it.
struct Field {
    name: String,
    of: String,
    text: String,
}

impl Field {
    /// What one writes, and what holds when it is not there; `None` for a table.
    fn kind(&self) -> Option<(&'static str, &'static str)> {
        Some(match self.of.as_str() {
            "bool" => ("`true`, `false`", "`false`"),
            "usize" | "u64" => ("number", ""),
            "ByteSize" => ("size (`\"2GiB\"`)", ""),
            "Option<ByteSize>" => ("size (`\"2GiB\"`)", "no limit"),
            "Vec<PathBuf>" => ("list of paths", "none"),
            "Vec<ipnet::IpNet>" => ("list of subnets", "none"),
            "Vec<PoolKind>" => ("list of kinds of pools", "none"),
            "Vec<String>" => ("list of texts", "none"),
            _ => return None,
        })
    }
}

fn sources() -> Result<Vec<String>, String> {
    let directory = root().join(HOST);
    let failed = |e: std::io::Error| format!("{HOST}: {e}");
    let mut files: Vec<PathBuf> = vec![];
    for entry in fs::read_dir(&directory).map_err(failed)? {
        files.push(entry.map_err(failed)?.path());
    }
    files.retain(|path| path.extension().is_some_and(|e| e == "rs"));
    files.sort();
    files.iter().map(|path| fs::read_to_string(path).map_err(failed)).collect()
}

/// The lines between `head` and the brace that ends it.
fn block<'a>(sources: &'a [String], head: &str) -> Option<Vec<&'a str>> {
    let head = format!("\n{head} {{\n");
    let (_, rest) = sources.iter().find_map(|source| source.split_once(head.as_str()))?;
    Some(rest.lines().take_while(|line| *line != "}").map(str::trim).collect())
}

/// The public fields of a struct, in order, with their documentation as one line.
fn fields(sources: &[String], name: &str) -> Result<Vec<Field>, String> {
    let lines = block(sources, &format!("pub struct {name}"))
        .ok_or_else(|| format!("{HOST}: there is no struct {name} for the page of the policy"))?;
    let (mut all, mut words) = (vec![], vec![]);
    for line in lines {
        if let Some(said) = line.strip_prefix("/// ") {
            words.push(said);
        } else if !line.starts_with("#[") {
            let field = line.strip_prefix("pub ").and_then(|l| l.strip_suffix(',')?.split_once(": "));
            let (field, of) =
                field.ok_or_else(|| format!("{HOST}: {name} has a line that is no field: {line}"))?;
            if words.is_empty() {
                return Err(format!("{HOST}: {name}.{field} has no documentation"));
            }
            let text = std::mem::take(&mut words).join(" ");
            all.push(Field { name: field.to_owned(), of: of.to_owned(), text });
        }
    }
    Ok(all)
}

/// What the struct's own `Default` says of a field, as one writes it.
fn default_of(sources: &[String], name: &str, field: &str) -> Option<String> {
    let lines = block(sources, &format!("impl Default for {name}"))?.join(" ");
    let begin = format!("{field}: ");
    let value = lines.split([',', '{', '}']).find_map(|part| part.trim().strip_prefix(begin.as_str()))?;
    Some(match (size(value, "mib"), size(value, "gib")) {
        (Some(number), _) => format!("`\"{number}MiB\"`"),
        (_, Some(number)) => format!("`\"{number}GiB\"`"),
        _ if value == "None" => "no limit".to_owned(),
        _ => format!("`{}`", value.replace('_', "")),
    })
}

/// The number of `ByteSize::UNIT(NUMBER)`.
fn size<'a>(value: &'a str, unit: &str) -> Option<&'a str> {
    value.strip_prefix("ByteSize::")?.strip_prefix(unit)?.strip_prefix('(')?.strip_suffix(')')
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r#"
/// What it grants.
#[serde(default)]
pub struct Policy {
    /// Directories
    /// of the host.
    pub places: Vec<PathBuf>,
    /// How much.
    #[serde(deserialize_with = "size")]
    pub room: ByteSize,
}

impl Default for Policy {
    fn default() -> Self {
        Self { places: vec![], room: ByteSize::mib(512), number: 10_000 }
    }
}
"#;

    #[test]
    fn fields_are_read_with_their_texts_and_defaults() {
        let sources = [SOURCE.to_owned()];
        let all = fields(&sources, "Policy").unwrap();
        let said: Vec<_> = all.iter().map(|f| (f.name.as_str(), f.of.as_str(), f.text.as_str())).collect();
        let wanted =
            [("places", "Vec<PathBuf>", "Directories of the host."), ("room", "ByteSize", "How much.")];
        assert_eq!(said, wanted);
        assert_eq!(default_of(&sources, "Policy", "room").as_deref(), Some("`\"512MiB\"`"));
        assert_eq!(default_of(&sources, "Policy", "number").as_deref(), Some("`10000`"));
        assert_eq!(default_of(&sources, "Policy", "other"), None);
    }

    #[test]
    fn what_is_not_understood_is_said() {
        let of = |source: &str| fields(&[source.to_owned()], "Policy").map(|_| ()).unwrap_err();
        assert!(of("").contains("no struct Policy"));
        assert!(of("\npub struct Policy {\n    pub bare: bool,\n}\n").contains("no documentation"));
        assert!(of("\npub struct Policy {\n    /// Two\n    /// lines.\n    pub\n}\n").contains("no field"));
    }

    #[test]
    fn every_field_of_the_policy_is_on_its_page() {
        let page = host_policy().unwrap();
        let policy = fs::read_to_string(root().join(HOST).join("policy.rs")).unwrap();
        let inside = policy.split_once("pub struct HostPolicy {").unwrap().1.split_once("\n}\n").unwrap().0;
        let names: Vec<_> =
            inside.lines().filter_map(|l| l.trim().strip_prefix("pub ")?.split(':').next()).collect();
        assert!(names.len() > 10);
        for name in names {
            assert!(
                page.contains(&format!("| `{name}` |")) || page.contains(&format!("## [{name}]")),
                "{name}"
            );
        }
    }
}
