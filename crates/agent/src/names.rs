//! Names of what lies outside DIR: they carry the daemon's short id, so that a purge finds all of it and several daemons
//! share a machine.

use karst_model::{Error, Result, device::interface_name};

/// Length of a daemon's short id: lower-case hexadecimal digits.
pub const DAEMON_ID_LENGTH: usize = 6;

/// Is it a daemon's short id?
pub fn is_daemon_id(id: &str) -> bool {
    id.len() == DAEMON_ID_LENGTH && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// What every interface of this daemon's guests begins with: `k` and the id.
pub fn interface_prefix(daemon_id: &str) -> String {
    format!("k{daemon_id}")
}

/// Is it the name of an interface that this daemon made for a guest?
pub fn is_guest_interface(daemon_id: &str, name: &str) -> bool {
    let rest = name.strip_prefix(&interface_prefix(daemon_id));
    rest.is_some_and(|r| (7..=8).contains(&r.len()) && r.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Name of a guest's interface on the host: the prefix and eight digits of the caller's choice, 15 bytes in all.
pub fn host_interface(daemon_id: &str, n: u32) -> String {
    format!("{}{n:08x}", interface_prefix(daemon_id))
}

/// Refuses a host interface that is not this daemon's.
///
/// # Errors
/// Invalid at `host_interface`.
pub fn check_host_interface(daemon_id: Option<&str>, name: &str) -> Result<()> {
    interface_name("host_interface", name)?;
    let Some(id) = daemon_id else { return Ok(()) };
    let prefix = interface_prefix(id);
    match name.strip_prefix(&prefix) {
        Some(rest) if !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_alphanumeric()) => Ok(()),
        _ => Err(Error::invalid(
            "host_interface",
            format!("{name:?} is not an interface of this daemon: its interfaces begin with {prefix:?}"),
        )),
    }
}

/// `wanted` when free, else with its number (or a new one) counted up.
///
/// # Errors
/// Conflict when nothing is free up to 999.
pub fn free_name(wanted: &str, taken: impl Fn(&str) -> bool) -> Result<String> {
    if !taken(wanted) {
        return Ok(wanted.to_owned());
    }
    let stem = wanted.trim_end_matches(|c: char| c.is_ascii_digit());
    (0..1000)
        .map(|n| {
            let number = n.to_string();
            let room = 15 - number.len();
            let stem: String = stem.chars().take(room).collect();
            stem + &number
        })
        .find(|name| !taken(name))
        .ok_or_else(|| Error::conflict(format!("no free interface name like {wanted:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_interfaces_of_this_daemon_pass() {
        let own = host_interface("a1b2c3", 7);
        assert_eq!((own.as_str(), own.len()), ("ka1b2c300000007", 15));
        check_host_interface(Some("a1b2c3"), &own).unwrap();
        for foreign in
            ["eth0", "docker0", "ka1b2c4", "ka1b2c3", "ka1b2c3/../x", "ka1b2c3 x", "kffffff00000001"]
        {
            assert!(check_host_interface(Some("a1b2c3"), foreign).is_err(), "{foreign}");
        }
        assert!(
            is_daemon_id("00ff1a") && !is_daemon_id("00FF1A") && !is_daemon_id("../../") && !is_daemon_id("")
        );
    }

    #[test]
    fn a_taken_name_is_counted_up() {
        assert_eq!(free_name("karstbr0", |_| false).unwrap(), "karstbr0");
        assert_eq!(free_name("karstbr0", |n| n == "karstbr0").unwrap(), "karstbr1");
        assert_eq!(free_name("abcdefghijklmno", |n| n == "abcdefghijklmno").unwrap(), "abcdefghijklmn0");
        assert!(free_name("x", |_| true).is_err());
    }
}
