//! Registries of the OCI that want a name and a password: who a project is there. The password is sealed.

use crate::{Error, ProjectId, Result, secret::Sealed};
use serde::{Deserialize, Serialize};
use std::net::Ipv6Addr;

/// Most registries of a project that are known by name.
pub const LOGINS_MAX: usize = 256;
/// Most bytes of a name.
const USER_MAX: usize = 255;
/// Most bytes of a password; some are tokens.
const PASSWORD_MAX: usize = 8 << 10;

/// Who a project is at a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryLogin {
    /// Project.
    pub project: ProjectId,
    /// `HOST` or `HOST:PORT`, in lower case, without the port that goes without saying.
    pub host: String,
    /// Name there.
    pub user: String,
    /// The registry's certificate (PEM) where no authority vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<String>,
    /// Password there.
    pub sealed: Sealed,
    /// Grows with each change.
    pub spec_version: u64,
}

/// Checks and spells one way what names a registry: `HOST`, `HOST:PORT`, or its address. The error repeats nothing that could
/// hold a password.
///
/// # Errors
/// Invalid at `field`.
pub fn host(field: &str, text: &str) -> Result<String> {
    let wrong = || {
        let said = if text.contains('@') { "this".to_owned() } else { format!("{text:?}") };
        Error::invalid(field, format!("{said} is not a registry; write HOST or HOST:PORT"))
    };
    let bare = text.strip_prefix("https://").unwrap_or(text);
    let bare = bare.strip_suffix('/').unwrap_or(bare).to_ascii_lowercase();
    let (name, port) = match bare.rsplit_once(':') {
        // Not within the brackets of an IPv6 address.
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (bare.as_str(), None),
    };
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    let fine = match name.strip_prefix('[').and_then(|n| n.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => name.len() <= 253 && name.split('.').all(label),
    };
    let port = match port {
        None => 443,
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            digits.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(wrong)?
        }
        Some(_) => return Err(wrong()),
    };
    match (fine, port) {
        (false, _) => Err(wrong()),
        (true, 443) => Ok(name.to_owned()),
        (true, port) => Ok(format!("{name}:{port}")),
    }
}

/// Checks a name.
///
/// # Errors
/// Invalid at `field`.
pub fn check_user(field: &str, user: &str) -> Result<()> {
    if user.is_empty() || user.len() > USER_MAX {
        return Err(Error::invalid(field, format!("the user's name has to have 1 to {USER_MAX} bytes")));
    }
    // Basic authentication has no way to say them.
    if user.contains(|c: char| c == ':' || c.is_control()) {
        return Err(Error::invalid(field, "the user's name may hold no colon and no control characters"));
    }
    Ok(())
}

/// Checks a password, of which the error says nothing.
///
/// # Errors
/// Invalid at `field`.
pub fn check_password(field: &str, password: &[u8]) -> Result<()> {
    if password.is_empty() || password.len() > PASSWORD_MAX {
        return Err(Error::invalid(field, format!("the password has to have 1 to {PASSWORD_MAX} bytes")));
    }
    if password.iter().any(u8::is_ascii_control) {
        return Err(Error::invalid(
            field,
            "the password may hold no control characters, such as the end of a line",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_spelled_one_way() {
        for (text, wanted) in [
            ("docker.io", "docker.io"),
            ("https://Registry.Example/", "registry.example"),
            ("registry.example:443", "registry.example"),
            ("127.0.0.1:5000", "127.0.0.1:5000"),
            ("[::1]:5000", "[::1]:5000"),
            ("https://[2001:DB8::1]", "[2001:db8::1]"),
        ] {
            assert_eq!(host("host", text).unwrap(), wanted, "{text}");
        }
        for bad in [
            "", ".", "..", "~root", "*", "a b", "a/b", "http://a", "a:0", "a:65536", "a:+1", "a:", "[::g]",
            "-a", "a\n",
        ] {
            let e = host("host", bad).unwrap_err();
            assert_eq!(e.field.as_deref(), Some("host"), "{bad}");
        }
        let e = host("host", "https://me:sesame@registry.example").unwrap_err();
        assert!(!e.message.contains("sesame"), "{e}");
    }

    #[test]
    fn names_and_passwords_are_checked() {
        check_user("user", "robot$ci").unwrap();
        check_password("password", "päss wörd".as_bytes()).unwrap();
        for bad in ["", "a:b", "a\n", &"x".repeat(300)] {
            assert!(check_user("user", bad).is_err());
        }
        for bad in ["", "sesame\n", &"x".repeat(9000)] {
            let e = check_password("password", bad.as_bytes()).unwrap_err();
            assert!(!e.message.contains("sesame"));
        }
    }
}
