//! Users by `/etc/passwd` itself: the program is linked statically and cannot load what `getpwuid` would ask.

/// What a program of a user needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) home: String,
    pub(super) shell: String,
}

/// By id.
pub(super) fn find(uid: u32) -> Option<User> {
    let text = std::fs::read("/etc/passwd").ok()?;
    parse(&String::from_utf8_lossy(&text), uid)
}

fn parse(passwd: &str, uid: u32) -> Option<User> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, id, _, _, home, shell] = fields[..] else { return None };
        (id.parse() == Ok(uid)).then(|| User { name: name.into(), home: home.into(), shell: shell.into() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_kinds() {
        let text = "root:x:0:0:root:/root:/bin/bash\n#comment\n+::::::\nbroken:x\n\ndaemon:*:1:1::/:/usr/sbin/nologin\nroot2:x:0:0::/other:/bin/sh\n";
        assert_eq!(parse(text, 0).unwrap().name, "root");
        assert_eq!(
            parse(text, 1).unwrap(),
            User { name: "daemon".into(), home: "/".into(), shell: "/usr/sbin/nologin".into() }
        );
        assert_eq!(parse(text, 2), None);
    }
}
