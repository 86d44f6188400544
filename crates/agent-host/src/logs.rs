//! What programs that run guests say, for eyes that are not root's: without the host's directories and identifiers of ours.

use std::path::Path;

/// The text with every path below `dir`, and every path of a control group, cut down to its last part.
pub(crate) fn without_places(log: &[u8], dir: &Path) -> Vec<u8> {
    let text = String::from_utf8_lossy(log);
    let dir = dir.to_string_lossy();
    let hidden = [dir.trim_end_matches('/'), "/sys/fs/cgroup", "/proc/", "karst-"];
    let ends = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ',' | ';' | ')' | ']' | '}' | '>');
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    loop {
        let found = hidden.iter().filter(|h| h.len() > 1).filter_map(|h| rest.find(h)).min();
        let Some(at) = found else { break };
        let (before, from) = rest.split_at(at);
        let end = from.find(ends).unwrap_or(from.len());
        let path = from[..end].trim_end_matches(['.', ':']);
        out.push_str(before);
        out.push_str("\u{2026}/");
        out.push_str(path.rsplit('/').next().unwrap_or_default());
        rest = &from[path.len().max(1)..];
    }
    out.push_str(rest);
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_says_where_things_lie() {
        let log = "INFO  start - \"/var/k/host/guests/6c0f/lxc.conf\" read\n\
                   ERROR cgfsng - mkdir /sys/fs/cgroup/memory/karst-ab12cd/6c0f/guest: File exists\n\
                   NOTICE exec /bin/init, group karst-ab12cd/6c0f.monitor.\nfd in /proc/4711/fd";
        let shown = String::from_utf8(without_places(log.as_bytes(), Path::new("/var/k/"))).unwrap();
        assert!(shown.contains("\"\u{2026}/lxc.conf\" read"), "{shown}");
        assert!(shown.contains("\u{2026}/guest: File exists") && shown.contains("/bin/init,"), "{shown}");
        for hidden in ["/var/k", "6c0f/", "karst-", "/sys/fs", "4711"] {
            assert!(!shown.contains(hidden), "{hidden}: {shown}");
        }
        assert_eq!(without_places(b"plain \xff", Path::new("/")), "plain \u{fffd}".as_bytes());
    }
}
