//! The host's own apt sources (sources.list(5), one-line and deb822), as far as they name a Debian archive.

use karst_model::{Error, Result};
use std::path::Path;

const DEFAULT_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "forky", "sid", "stable", "oldstable", "testing"];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    uri: String,
    suite: String,
    keyring: Option<String>,
}

/// Lines of a sources.list for `suite`, made of the mirrors that the host itself uses.
///
/// # Errors
/// Unsupported when the host uses no Debian archive.
pub fn lines_for(suite: &str, etc_apt: &Path) -> Result<Vec<String>> {
    let mut entries = Vec::new();
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(dir) = std::fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut more: Vec<_> = dir.flatten().map(|e| e.path()).collect();
        more.sort();
        files.extend(more);
    }
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => one_line(&text, &mut entries),
            Some("sources") => deb822(&text, &mut entries),
            _ => {}
        }
    }
    choose(suite, &entries).ok_or_else(|| {
        Error::unsupported(
            "no Debian archive is among this host's apt sources; add one (suites, component main) to build Debian images",
        )
    })
}

fn choose(suite: &str, entries: &[Entry]) -> Option<Vec<String>> {
    let line = |e: &Entry, suite: &str| {
        let keyring = e.keyring.as_deref().unwrap_or(DEFAULT_KEYRING);
        format!("deb [signed-by={keyring}] {} {suite} main", e.uri)
    };
    let exact = |s: &str| entries.iter().find(|e| e.suite == s);
    // A mirror of one suite of Debian has the others too.
    let archive = exact(suite).or_else(|| entries.iter().find(|e| SUITES.contains(&e.suite.as_str())))?;
    let mut lines = vec![line(archive, suite)];
    for pocket in ["security", "updates"] {
        let wanted = format!("{suite}-{pocket}");
        let found = exact(&wanted).or_else(|| {
            entries.iter().find(|e| {
                let base = e.suite.strip_suffix(pocket).and_then(|s| s.strip_suffix('-'));
                base.is_some_and(|s| SUITES.contains(&s))
            })
        });
        lines.extend(found.map(|e| line(e, &wanted)));
    }
    Some(lines)
}

fn keep(entries: &mut Vec<Entry>, uri: &str, suite: &str, keyring: Option<&str>) {
    let fetchable =
        ["http://", "https://", "mirror+http", "file:", "ftp://"].iter().any(|p| uri.starts_with(p));
    // They become words of a line that apt parses: nothing may end or bracket it.
    let plain = |s: &str| {
        !s.is_empty() && !s.chars().any(|c| c.is_whitespace() || c.is_control() || "[]".contains(c))
    };
    if fetchable && plain(uri) && plain(suite) {
        entries.push(Entry {
            uri: uri.to_owned(),
            suite: suite.to_owned(),
            keyring: keyring.filter(|k| k.starts_with('/') && plain(k)).map(str::to_owned),
        });
    }
}

fn one_line(text: &str, entries: &mut Vec<Entry>) {
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb").filter(|r| r.starts_with(char::is_whitespace)) else {
            continue;
        };
        let mut rest = rest.trim();
        let mut keyring = None;
        if let Some(inner) = rest.strip_prefix('[') {
            let Some((options, after)) = inner.split_once(']') else {
                continue;
            };
            keyring = options.split_whitespace().find_map(|o| o.strip_prefix("signed-by="));
            rest = after.trim();
        }
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite), true) = (words.next(), words.next(), words.any(|c| c == "main")) {
            keep(entries, uri, suite, keyring);
        }
    }
}

fn deb822(text: &str, entries: &mut Vec<Entry>) {
    for stanza in
        text.lines().filter(|l| !l.starts_with('#')).collect::<Vec<_>>().split(|l| l.trim().is_empty())
    {
        let mut fields: Vec<(String, String)> = Vec::new();
        for line in stanza {
            if line.starts_with([' ', '\t']) {
                if let Some((_, value)) = fields.last_mut() {
                    value.push('\n');
                    value.push_str(line.trim());
                }
            } else if let Some((name, value)) = line.split_once(':') {
                fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
            }
        }
        let get = |name: &str| fields.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v.as_str());
        let has = |name: &str, word: &str| get(name).split_whitespace().any(|w| w == word);
        if !has("types", "deb") || !has("components", "main") || has("enabled", "no") {
            continue;
        }
        let keyring = get("signed-by").lines().next().filter(|k| !k.is_empty());
        for uri in get("uris").split_whitespace() {
            for suite in get("suites").split_whitespace() {
                keep(entries, uri, suite, keyring);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(files: &[(&str, &str)], suite: &str) -> Result<Vec<String>> {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            std::fs::write(d.path().join(name), text).unwrap();
        }
        lines_for(suite, d.path())
    }

    const MODERN: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/k.gpg\n\nTypes: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n";

    #[test]
    fn both_forms_are_read_and_other_suites_come_from_the_same_mirror() {
        let want = |s: &str, u: &str| {
            vec![
                format!("deb [signed-by={u}] http://mirror.example/debian {s} main"),
                format!(
                    "deb [signed-by={DEFAULT_KEYRING}] http://mirror.example/debian-security {s}-security main"
                ),
                format!("deb [signed-by={u}] http://mirror.example/debian {s}-updates main"),
            ]
        };
        let modern = [("sources.list.d/debian.sources", MODERN)];
        assert_eq!(lines(&modern, "bookworm").unwrap(), want("bookworm", "/usr/share/keyrings/k.gpg"));
        assert_eq!(lines(&modern, "trixie").unwrap(), want("trixie", "/usr/share/keyrings/k.gpg"));
        let old = "deb cdrom:[Debian]/ bookworm main\n# deb http://no.example/ bookworm main\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n";
        assert_eq!(
            lines(&[("sources.list", old)], "bookworm").unwrap(),
            ["deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main"]
        );
    }

    #[test]
    fn a_host_without_debian_is_told_so() {
        let ubuntu = "deb http://archive.example/ubuntu noble main universe\n";
        let e = lines(&[("sources.list", ubuntu)], "bookworm").unwrap_err();
        assert!(e.is(karst_model::ErrorKind::Unsupported) && e.message.contains("apt sources"));
        let disabled = MODERN.replace("Types: deb\n", "Types: deb\nEnabled: no\n");
        assert!(lines(&[("sources.list.d/a.sources", &disabled)], "bookworm").is_err());
    }
}
