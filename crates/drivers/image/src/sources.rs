//! The host's own apt sources (sources.list(5), one-line and deb822), as far as they name a Debian archive. Where they name
//! none, as on Ubuntu, it is Debian's official archive, checked by the keys of the package debian-archive-keyring.

use karst_model::{Error, Result};
use std::path::Path;

const DEFAULT_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SUITES: &[&str] = &["bullseye", "bookworm", "trixie", "forky", "sid"];
/// Names of suites that the archives of many others have too: they count where the address says Debian.
const COMMON_SUITES: &[&str] = &["stable", "oldstable", "testing", "unstable"];
/// The archives that Debian itself offers to everybody, and the pockets that each has.
const OFFICIAL: &[(&str, &[&str])] = &[
    ("http://deb.debian.org/debian", &["", "-updates"]),
    ("http://deb.debian.org/debian-security", &["-security"]),
];
/// Suites without pockets.
const ROLLING: &[&str] = &["sid", "unstable"];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    uri: String,
    suite: String,
    keyring: Option<String>,
}

/// Is it an archive of Debian, of a suite (without its pocket)?
fn is_debian(entry: &Entry, suite: &str) -> bool {
    SUITES.contains(&suite) || (COMMON_SUITES.contains(&suite) && entry.uri.contains("debian"))
}

/// Lines of a sources.list for `suite`, made of the mirrors that the host itself uses; of Debian's own, where it uses none.
///
/// # Errors
/// Unsupported when the host uses no Debian archive and has not Debian's keys either.
pub fn lines_for(suite: &str, etc_apt: &Path) -> Result<Vec<String>> {
    lines_checked_by(suite, etc_apt, Path::new(DEFAULT_KEYRING))
}

fn official(suite: &str, keyring: &Path) -> Vec<String> {
    let line =
        |uri: &str, pocket: &str| format!("deb [signed-by={}] {uri} {suite}{pocket} main", keyring.display());
    let all = OFFICIAL.iter().flat_map(|(uri, pockets)| pockets.iter().map(|p| (*uri, *p)));
    all.filter(|(_, p)| p.is_empty() || !ROLLING.contains(&suite)).map(|(uri, p)| line(uri, p)).collect()
}

fn lines_checked_by(suite: &str, etc_apt: &Path, keyring: &Path) -> Result<Vec<String>> {
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
    if let Some(lines) = choose(suite, &entries) {
        return Ok(lines);
    }
    // Without the keys nothing says that what comes is Debian's.
    if !keyring.is_file() {
        return Err(Error::unsupported(
            "no Debian archive is among this host's apt sources, and the keys by which Debian's own would be checked are \
             not here; install the package debian-archive-keyring to build Debian images",
        ));
    }
    Ok(official(suite, keyring))
}

fn choose(suite: &str, entries: &[Entry]) -> Option<Vec<String>> {
    let line = |e: &Entry, suite: &str| {
        let keyring = e.keyring.as_deref().unwrap_or(DEFAULT_KEYRING);
        format!("deb [signed-by={keyring}] {} {suite} main", e.uri)
    };
    let exact = |s: &str| entries.iter().find(|e| e.suite == s);
    // A mirror of one suite of Debian has the others too.
    let archive = exact(suite).or_else(|| entries.iter().find(|e| is_debian(e, &e.suite)))?;
    let mut lines = vec![line(archive, suite)];
    for pocket in ["security", "updates"] {
        let wanted = format!("{suite}-{pocket}");
        let found = exact(&wanted).or_else(|| {
            entries.iter().find(|e| {
                let base = e.suite.strip_suffix(pocket).and_then(|s| s.strip_suffix('-'));
                base.is_some_and(|s| is_debian(e, s))
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
    fn a_host_without_debian_takes_debians_own_archive() {
        let ubuntu = "deb http://archive.example/ubuntu noble main universe\n";
        // Archives of others have suites of these names too.
        let others = "deb [signed-by=/k.gpg] https://dl.example/linux/chrome/deb/ stable main\n";
        let disabled = MODERN.replace("Types: deb\n", "Types: deb\nEnabled: no\n");
        let d = tempfile::tempdir().unwrap();
        let keyring = d.path().join("debian.gpg");
        std::fs::create_dir(d.path().join("sources.list.d")).unwrap();
        std::fs::write(d.path().join("sources.list"), ubuntu).unwrap();
        std::fs::write(d.path().join("sources.list.d/browser.list"), others).unwrap();
        std::fs::write(d.path().join("sources.list.d/debian.sources"), disabled).unwrap();
        let e = lines_checked_by("bookworm", d.path(), &keyring).unwrap_err();
        assert!(
            e.is(karst_model::ErrorKind::Unsupported) && e.message.contains("package debian-archive-keyring")
        );
        std::fs::write(&keyring, "keys").unwrap();
        let signed = format!("deb [signed-by={}] http://deb.debian.org", keyring.display());
        assert_eq!(
            lines_checked_by("bookworm", d.path(), &keyring).unwrap(),
            [
                format!("{signed}/debian bookworm main"),
                format!("{signed}/debian bookworm-updates main"),
                format!("{signed}/debian-security bookworm-security main"),
            ]
        );
        assert_eq!(
            lines_checked_by("sid", d.path(), &keyring).unwrap(),
            [format!("{signed}/debian sid main")]
        );
        // A mirror that the host has comes first, by whatever name it calls the suite.
        let own = "deb http://mirror.example/debian stable main\n";
        std::fs::write(d.path().join("sources.list"), own).unwrap();
        assert_eq!(
            lines_checked_by("bookworm", d.path(), &keyring).unwrap(),
            [format!("deb [signed-by={DEFAULT_KEYRING}] http://mirror.example/debian bookworm main")]
        );
    }
}
