//! Where a recipe's packages come from: what the administrator of the host says (`recipes.sources` of its policy), else the
//! host's own apt sources (sources.list(5), one-line and deb822), as far as they name an archive of the distribution, else the
//! distribution's own archive, checked by the keys of a package of this host.

use karst_model::{Error, Result};
use std::path::{Path, PathBuf};

/// The archive of a distribution.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Archive {
    /// As people call the distribution.
    pub(crate) name: &'static str,
    /// Its keys, as they lie on a host that has `keys_package`.
    keys: &'static str,
    keys_package: &'static str,
    suites: &'static [&'static str],
    /// Names of suites that the archives of many others have too: they count where the address says the distribution's.
    common_suites: &'static [&'static str],
    /// Others offer packages for suites of the same names, and call what they have `main`. Only this archive has the component
    /// too, or is at an address of this domain.
    known_by: Option<(&'static str, &'static str)>,
    /// What of it recipes use.
    components: &'static [&'static str],
    /// What the distribution offers to everybody, and the pockets that each place has.
    official: &'static [(&'static str, &'static [&'static str])],
}

/// Debian's.
pub(crate) const DEBIAN: Archive = Archive {
    name: "Debian",
    keys: "/usr/share/keyrings/debian-archive-keyring.gpg",
    keys_package: "debian-archive-keyring",
    suites: &["bullseye", "bookworm", "trixie", "forky", "sid"],
    common_suites: &["stable", "oldstable", "testing", "unstable"],
    known_by: None,
    components: &["main"],
    official: &[
        ("http://deb.debian.org/debian", &["", "-updates"]),
        ("http://deb.debian.org/debian-security", &["-security"]),
    ],
};

/// Ubuntu's.
pub(crate) const UBUNTU: Archive = Archive {
    name: "Ubuntu",
    keys: "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
    keys_package: "ubuntu-keyring",
    suites: &["focal", "jammy", "noble", "plucky", "questing", "resolute"],
    common_suites: &[],
    // Archives of persons (PPA) have suites of the same names, each with `main` alone.
    known_by: Some(("universe", "ubuntu.com")),
    components: &["main", "universe"],
    official: &[
        ("http://archive.ubuntu.com/ubuntu", &["", "-updates"]),
        ("http://security.ubuntu.com/ubuntu", &["-security"]),
    ],
};

/// Suites without pockets.
const ROLLING: &[&str] = &["sid", "unstable"];
/// What is asked of a mirror besides the suite itself.
const POCKETS: &[&str] = &["security", "updates"];

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    uri: String,
    suite: String,
    components: Vec<String>,
    keyring: Option<String>,
}

impl Archive {
    /// Is it this archive, of this suite (without its pocket)?
    fn has(&self, entry: &Entry, suite: &str) -> bool {
        let name = self.name.to_ascii_lowercase();
        self.suites.contains(&suite) || (self.common_suites.contains(&suite) && entry.uri.contains(&name))
    }

    /// Is it not somebody else's packages for this distribution?
    fn is_meant(&self, entry: &Entry) -> bool {
        let Some((component, domain)) = self.known_by else {
            return true;
        };
        entry.components.iter().any(|c| c == component) || within(&entry.uri, domain)
    }

    fn official(&self, suite: &str, keys: &Path) -> Vec<String> {
        let all = self.official.iter().flat_map(|(uri, pockets)| pockets.iter().map(|p| (*uri, *p)));
        let wanted = all.filter(|(_, p)| p.is_empty() || !ROLLING.contains(&suite));
        let components = self.components.join(" ");
        wanted
            .map(|(uri, p)| format!("deb [signed-by={}] {uri} {suite}{p} {components}", keys.display()))
            .collect()
    }

    /// A line for each pocket of `suite` that one of the entries has; a mirror of one suite has the others too.
    fn choose(&self, suite: &str, entries: &[&Entry], keys: &Path) -> Option<Vec<String>> {
        let line = |e: &Entry, suite: &str| {
            let keyring = e.keyring.as_deref().map_or_else(|| keys.display().to_string(), str::to_owned);
            let has = |c: &&str| e.components.iter().any(|have| have == c);
            let components: Vec<&str> = self.components.iter().copied().filter(has).collect();
            format!("deb [signed-by={keyring}] {} {suite} {}", e.uri, components.join(" "))
        };
        let exact = |s: &str| entries.iter().find(|e| e.suite == s);
        let archive = exact(suite).or_else(|| entries.iter().find(|e| self.has(e, &e.suite)))?;
        let mut lines = vec![line(archive, suite)];
        for pocket in POCKETS.iter().copied() {
            let wanted = format!("{suite}-{pocket}");
            let found = exact(&wanted).or_else(|| {
                entries.iter().find(|e| {
                    let base = e.suite.strip_suffix(pocket).and_then(|s| s.strip_suffix('-'));
                    base.is_some_and(|s| self.has(e, s))
                })
            });
            lines.extend(found.map(|e| line(e, &wanted)));
        }
        Some(lines)
    }

    /// Lines of a sources.list for `suite`. `said` are those of the host's policy, which [`check`] has taken.
    ///
    /// # Errors
    /// Unsupported when the keys that what comes would be checked by are not on this host.
    pub(crate) fn lines(&self, suite: &str, said: &[String], etc_apt: &Path) -> Result<Vec<String>> {
        self.lines_checked_by(suite, said, etc_apt, Path::new(self.keys))
    }

    fn lines_checked_by(
        &self,
        suite: &str,
        said: &[String],
        etc_apt: &Path,
        keys: &Path,
    ) -> Result<Vec<String>> {
        let mut of_policy = Vec::new();
        one_line(&said.join("\n"), &mut of_policy);
        // What is said for another distribution says nothing of this one.
        let base = |e: &Entry| {
            let pocket = POCKETS.iter().find_map(|p| e.suite.strip_suffix(*p)?.strip_suffix('-'));
            pocket.unwrap_or(&e.suite).to_owned()
        };
        let of_policy: Vec<&Entry> = of_policy.iter().filter(|e| self.has(e, &base(e))).collect();
        let of_host = of_host(etc_apt);
        let of_host: Vec<&Entry> = of_host.iter().filter(|e| self.is_meant(e)).collect();
        let found = self
            .choose(suite, &of_policy, keys)
            .or_else(|| self.choose(suite, &of_host, keys))
            .unwrap_or_else(|| self.official(suite, keys));
        // Without the keys nothing says that what comes is the distribution's.
        let by_keys = format!("signed-by={}]", keys.display());
        if !keys.is_file() && found.iter().any(|line| line.contains(&by_keys)) {
            return Err(Error::unsupported(format!(
                "the keys by which {0}'s packages are checked are not on this host ({1}); install its package {2} to build \
                 {0} images, or name a mirror with its own keys by recipes.sources in host-policy.toml",
                self.name,
                keys.display(),
                self.keys_package
            )));
        }
        Ok(found)
    }
}

/// Does the address lie in this domain?
fn within(uri: &str, domain: &str) -> bool {
    let host = uri.split_once("://").map_or("", |(_, rest)| rest);
    let host = host.split(['/', ':']).next().unwrap_or_default();
    host.strip_suffix(domain).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// All entries of the host's apt sources that could be fetched from.
fn of_host(etc_apt: &Path) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(dir) = std::fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut more: Vec<PathBuf> = dir.flatten().map(|e| e.path()).collect();
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
    entries
}

/// Is it a line that recipes can use (`recipes.sources` of the host's policy)? One archive of Debian or Ubuntu that is fetched
/// over the network, of one suite, with `main`; a key of its own is named by its path.
///
/// # Errors
/// Invalid, with what is wrong with it.
pub fn check(line: &str) -> Result<()> {
    let wrong = |text: &str| Err(Error::invalid("recipes.sources", format!("{line:?} {text}")));
    let mut entries = Vec::new();
    one_line(line, &mut entries);
    let [entry] = entries.as_slice() else {
        return wrong(
            "is not one line of sources.list for an archive with main, such as \"deb [signed-by=/etc/karst/mirror.gpg] \
             http://mirror.example/ubuntu noble main universe\"",
        );
    };
    if line.contains("signed-by=") && entry.keyring.is_none() {
        return wrong("names its keys by something that is no absolute path");
    }
    // mmdebstrap installs inside the new system, which has no view of the host's directories.
    if entry.uri.starts_with("file:") {
        return wrong("is a directory of this host, which a build cannot reach; serve it over http");
    }
    let suite = entry.suite.split('-').next().unwrap_or_default();
    if ![DEBIAN, UBUNTU].iter().any(|a| a.has(entry, suite)) {
        return wrong("is of a suite that no recipe knows");
    }
    Ok(())
}

fn keep(entries: &mut Vec<Entry>, uri: &str, suite: &str, components: &[&str], keyring: Option<&str>) {
    let fetchable =
        ["http://", "https://", "mirror+http", "file:", "ftp://"].iter().any(|p| uri.starts_with(p));
    // They become words of a line that apt parses: nothing may end or bracket it.
    let plain = |s: &str| {
        !s.is_empty() && !s.chars().any(|c| c.is_whitespace() || c.is_control() || "[]".contains(c))
    };
    if fetchable && plain(uri) && plain(suite) && components.contains(&"main") {
        entries.push(Entry {
            uri: uri.to_owned(),
            suite: suite.to_owned(),
            components: components.iter().map(|c| (*c).to_owned()).collect(),
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
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            keep(entries, uri, suite, &words.collect::<Vec<_>>(), keyring);
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
        if !has("types", "deb") || has("enabled", "no") {
            continue;
        }
        let components: Vec<&str> = get("components").split_whitespace().collect();
        let keyring = get("signed-by").lines().next().filter(|k| !k.is_empty());
        for uri in get("uris").split_whitespace() {
            for suite in get("suites").split_whitespace() {
                keep(entries, uri, suite, &components, keyring);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory as /etc/apt, and the keys beside it.
    fn apt(files: &[(&str, &str)]) -> (tempfile::TempDir, PathBuf) {
        let d = tempfile::tempdir().unwrap();
        std::fs::create_dir(d.path().join("sources.list.d")).unwrap();
        for (name, text) in files {
            std::fs::write(d.path().join(name), text).unwrap();
        }
        let keys = d.path().join("archive.gpg");
        std::fs::write(&keys, "keys").unwrap();
        (d, keys)
    }

    fn lines(archive: &Archive, suite: &str, said: &[&str], files: &[(&str, &str)]) -> Vec<String> {
        let (d, keys) = apt(files);
        let said: Vec<String> = said.iter().map(|l| (*l).to_owned()).collect();
        let found = archive.lines_checked_by(suite, &said, d.path(), &keys).unwrap();
        let keys = keys.display().to_string();
        found.iter().map(|l| l.replace(&keys, "KEYS")).collect()
    }

    const MODERN: &str = "Types: deb\n# a comment\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\nSigned-By: /usr/share/keyrings/k.gpg\n\nTypes: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n";
    /// As an Ubuntu 24.04 has it after a PPA was added.
    const UBUNTU_HOST: [(&str, &str); 2] = [
        (
            "sources.list.d/person-ubuntu-ppa-noble.sources",
            "Types: deb\nURIs: https://ppa.launchpadcontent.net/person/ppa/ubuntu/\nSuites: noble\nComponents: main\n",
        ),
        (
            "sources.list.d/ubuntu.sources",
            "Types: deb\nURIs: http://de.archive.ubuntu.com/ubuntu/\nSuites: noble noble-updates noble-backports\nComponents: main restricted universe multiverse\nSigned-By: /usr/share/keyrings/u.gpg\n\nTypes: deb\nURIs: http://security.ubuntu.com/ubuntu/\nSuites: noble-security\nComponents: main restricted universe multiverse\nSigned-By: /usr/share/keyrings/u.gpg\n",
        ),
    ];

    #[test]
    fn both_forms_are_read_and_other_suites_come_from_the_same_mirror() {
        let want = |s: &str, u: &str| {
            vec![
                format!("deb [signed-by={u}] http://mirror.example/debian {s} main"),
                format!("deb [signed-by=KEYS] http://mirror.example/debian-security {s}-security main"),
                format!("deb [signed-by={u}] http://mirror.example/debian {s}-updates main"),
            ]
        };
        let modern = [("sources.list.d/debian.sources", MODERN)];
        let own = "/usr/share/keyrings/k.gpg";
        assert_eq!(lines(&DEBIAN, "bookworm", &[], &modern), want("bookworm", own));
        assert_eq!(lines(&DEBIAN, "trixie", &[], &modern), want("trixie", own));
        let old = "deb cdrom:[Debian]/ bookworm main\n# deb http://no.example/ bookworm main\ndeb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian bookworm main contrib\n";
        assert_eq!(
            lines(&DEBIAN, "bookworm", &[], &[("sources.list", old)]),
            ["deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main"]
        );
    }

    #[test]
    fn a_host_of_ubuntu_uses_its_own_mirror_and_nobody_elses() {
        let own = |s: &str| {
            let line = |uri: &str, s: String| {
                format!("deb [signed-by=/usr/share/keyrings/u.gpg] http://{uri}/ubuntu/ {s} main universe")
            };
            vec![
                line("de.archive.ubuntu.com", s.to_owned()),
                line("security.ubuntu.com", format!("{s}-security")),
                line("de.archive.ubuntu.com", format!("{s}-updates")),
            ]
        };
        assert_eq!(lines(&UBUNTU, "noble", &[], &UBUNTU_HOST), own("noble"));
        assert_eq!(lines(&UBUNTU, "jammy", &[], &UBUNTU_HOST), own("jammy"));
        // An own mirror is known by what it has.
        let mirror = "deb [signed-by=/k.gpg] http://mirror.example/u noble main universe\n";
        assert_eq!(
            lines(&UBUNTU, "noble", &[], &[("sources.list", mirror)]),
            ["deb [signed-by=/k.gpg] http://mirror.example/u noble main universe"]
        );
        let official = lines(&UBUNTU, "noble", &[], &UBUNTU_HOST[..1]);
        assert_eq!(
            official,
            [
                "deb [signed-by=KEYS] http://archive.ubuntu.com/ubuntu noble main universe",
                "deb [signed-by=KEYS] http://archive.ubuntu.com/ubuntu noble-updates main universe",
                "deb [signed-by=KEYS] http://security.ubuntu.com/ubuntu noble-security main universe",
            ]
        );
        // Ubuntu's entries are no Debian archive, nor the other way round.
        assert!(lines(&DEBIAN, "bookworm", &[], &UBUNTU_HOST)[0].contains("deb.debian.org"));
        let debian = [("sources.list.d/debian.sources", MODERN)];
        assert_eq!(lines(&UBUNTU, "noble", &[], &debian), official);
        assert!(within("http://archive.ubuntu.com:80/ubuntu", "ubuntu.com"));
        for other in ["http://notubuntu.com/x", "http://x.example/ubuntu.com", "file:/ubuntu.com"] {
            assert!(!within(other, "ubuntu.com"), "{other}");
        }
    }

    #[test]
    fn what_the_policy_says_comes_before_the_hosts_own() {
        let said = [
            "deb [signed-by=/etc/karst/m.gpg] http://mirror.example/ubuntu noble main",
            "deb http://mirror.example/ubuntu noble-security main universe",
            "deb http://mirror.example/debian trixie main",
        ];
        for line in said {
            check(line).unwrap();
        }
        assert_eq!(
            lines(&UBUNTU, "noble", &said, &UBUNTU_HOST),
            [
                "deb [signed-by=/etc/karst/m.gpg] http://mirror.example/ubuntu noble main",
                "deb [signed-by=KEYS] http://mirror.example/ubuntu noble-security main universe",
            ]
        );
        let debian = [("sources.list.d/debian.sources", MODERN)];
        assert_eq!(
            lines(&DEBIAN, "bookworm", &said, &debian),
            ["deb [signed-by=KEYS] http://mirror.example/debian bookworm main"]
        );
        assert_eq!(lines(&DEBIAN, "bookworm", &said[..2], &debian).len(), 3, "what is said of Ubuntu alone");
    }

    #[test]
    fn a_line_that_recipes_cannot_use_is_refused() {
        for (line, why) in [
            ("", "is not one line"),
            ("deb http://mirror.example/ubuntu noble", "is not one line"),
            ("deb http://mirror.example/ubuntu noble universe", "is not one line"),
            ("deb-src http://mirror.example/ubuntu noble main", "is not one line"),
            ("deb cdrom:[x]/ noble main", "is not one line"),
            ("deb http://a.example/ noble main\ndeb http://b.example/ noble main", "is not one line"),
            ("deb [signed-by=mirror.gpg] http://mirror.example/ubuntu noble main", "no absolute path"),
            ("deb file:/srv/mirror noble main universe", "serve it over http"),
            ("deb http://mirror.example/fedora rawhide main", "no recipe knows"),
            ("deb http://mirror.example/x stable main", "no recipe knows"),
        ] {
            let e = check(line).unwrap_err();
            assert!(
                e.field.as_deref() == Some("recipes.sources") && e.message.contains(why),
                "{line:?}: {e}"
            );
        }
    }

    #[test]
    fn a_host_without_debian_takes_debians_own_archive() {
        // Archives of others have suites of these names too.
        let others = "deb [signed-by=/k.gpg] https://dl.example/linux/chrome/deb/ stable main\n";
        let disabled = MODERN.replace("Types: deb\n", "Types: deb\nEnabled: no\n");
        let (d, keys) = apt(&[
            ("sources.list", "deb http://archive.example/ubuntu noble main universe\n"),
            ("sources.list.d/browser.list", others),
            ("sources.list.d/debian.sources", disabled.as_str()),
        ]);
        let found = |archive: &Archive, suite: &str| archive.lines_checked_by(suite, &[], d.path(), &keys);
        std::fs::remove_file(&keys).unwrap();
        for (archive, suite, package) in [
            (&DEBIAN, "bookworm", "package debian-archive-keyring"),
            (&UBUNTU, "noble", "package ubuntu-keyring"),
        ] {
            let e = found(archive, suite).unwrap_err();
            assert!(e.is(karst_model::ErrorKind::Unsupported) && e.message.contains(package), "{e}");
        }
        std::fs::write(&keys, "keys").unwrap();
        let signed = format!("deb [signed-by={}] http://deb.debian.org", keys.display());
        assert_eq!(
            found(&DEBIAN, "bookworm").unwrap(),
            [
                format!("{signed}/debian bookworm main"),
                format!("{signed}/debian bookworm-updates main"),
                format!("{signed}/debian-security bookworm-security main"),
            ]
        );
        assert_eq!(found(&DEBIAN, "sid").unwrap(), [format!("{signed}/debian sid main")]);
        // A mirror that the host has comes first, by whatever name it calls the suite.
        let own = "deb http://mirror.example/debian stable main\n";
        std::fs::write(d.path().join("sources.list"), own).unwrap();
        assert_eq!(
            found(&DEBIAN, "bookworm").unwrap(),
            [format!("deb [signed-by={}] http://mirror.example/debian bookworm main", keys.display())]
        );
        // Whose keys are named needs no others.
        std::fs::write(d.path().join("sources.list"), own.replace("deb http", "deb [signed-by=/k.gpg] http"))
            .unwrap();
        std::fs::remove_file(&keys).unwrap();
        assert_eq!(
            found(&DEBIAN, "bookworm").unwrap()[0],
            "deb [signed-by=/k.gpg] http://mirror.example/debian bookworm main"
        );
    }
}
