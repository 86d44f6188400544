//! `raw.dnsmasq`: lines that are added to the configuration of a network's dnsmasq, which reads it as root.
//!
//! Taken are the options that say what guests are answered. Not taken, and unknown ones neither, are those that execute
//! programs, read or write files, name users or interfaces, or change the host's sets of addresses: who may edit a network
//! is not the host's root, even where the host grants these lines.

use crate::{Error, Result};

/// Options that are taken, by name.
const ANSWERS: &[&str] = &[
    "address",
    "alias",
    "all-servers",
    "bogus-nxdomain",
    "bogus-priv",
    "bootp-dynamic",
    "caa-record",
    "cache-rr",
    "cache-size",
    "cname",
    "dhcp-authoritative",
    "dhcp-boot",
    "dhcp-broadcast",
    "dhcp-circuitid",
    "dhcp-client-update",
    "dhcp-fqdn",
    "dhcp-generate-names",
    "dhcp-host",
    "dhcp-ignore",
    "dhcp-ignore-clid",
    "dhcp-ignore-names",
    "dhcp-lease-max",
    "dhcp-mac",
    "dhcp-match",
    "dhcp-name-match",
    "dhcp-no-override",
    "dhcp-option",
    "dhcp-option-force",
    "dhcp-option-pxe",
    "dhcp-pxe-vendor",
    "dhcp-range",
    "dhcp-rapid-commit",
    "dhcp-remoteid",
    "dhcp-reply-delay",
    "dhcp-sequential-ip",
    "dhcp-subscrid",
    "dhcp-ttl",
    "dhcp-userclass",
    "dhcp-vendorclass",
    "dns-forward-max",
    "dns-loop-detect",
    "dns-rr",
    "dnssec",
    "dnssec-check-unsigned",
    "domain",
    "domain-needed",
    "edns-packet-max",
    "expand-hosts",
    "fast-dns-retry",
    "filter-A",
    "filter-AAAA",
    "filter-rr",
    "filterwin2k",
    "host-record",
    "ignore-address",
    "local",
    "local-ttl",
    "localise-queries",
    "localmx",
    "log-dhcp",
    "log-queries",
    "max-cache-ttl",
    "max-ttl",
    "min-cache-ttl",
    "mx-host",
    "mx-target",
    "naptr-record",
    "neg-ttl",
    "no-negcache",
    "no-ping",
    "no-resolv",
    "no-round-robin",
    "proxy-dnssec",
    "ptr-record",
    "pxe-prompt",
    "pxe-service",
    "quiet-dhcp",
    "quiet-dhcp6",
    "quiet-ra",
    "rebind-domain-ok",
    "rebind-localhost-ok",
    "rev-server",
    "selfmx",
    "server",
    "srv-host",
    "stop-dns-rebind",
    "strict-order",
    "synth-domain",
    "tag-if",
    "trust-anchor",
    "txt-record",
    "use-stale-cache",
];

/// Longest line, in bytes: dnsmasq takes what stands behind its own limit (1024) as the next line.
const LONGEST: usize = 1000;
/// Largest text, in bytes.
const LARGEST: usize = 64 << 10;

/// Checks the lines.
///
/// # Errors
/// Invalid, naming the line and its option.
pub fn check_lines(field: &str, text: &str) -> Result<()> {
    let wrong = |n: usize, why: String| Err(Error::invalid(field, format!("line {}: {why}", n + 1)));
    if text.len() > LARGEST {
        return Err(Error::invalid(field, format!("has more than {LARGEST} bytes")));
    }
    for (n, line) in text.split('\n').enumerate() {
        if line.len() > LONGEST {
            return wrong(n, format!("has more than {LONGEST} bytes"));
        }
        if line.chars().any(|c| c.is_control() && c != '\t') {
            return wrong(n, "has a control character".into());
        }
        let line = line.trim_matches([' ', '\t']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // An option without a value may have a comment behind it. Quotes, which dnsmasq takes away, are in no name.
        let name = line.split(['=', ' ', '\t']).next().unwrap_or_default();
        if ANSWERS.binary_search(&name).is_err() {
            return wrong(
                n,
                format!(
                    "{name:?} is none of the options that are taken: those that say what guests are answered, none that \
                     names files, programs, users or interfaces"
                ),
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_guests_are_answered() {
        assert!(ANSWERS.is_sorted(), "it is searched");
        let check = |text: &str| check_lines("config.raw.dnsmasq", text);
        check("").unwrap();
        check(
            "# some\naddress=/wide.example/10.1.2.3\n\n  dhcp-option = option:ntp-server,10.1.2.9 # x\nno-resolv\t# y\n\
             txt-record=a.example,\"b \\\"c\"\n",
        )
        .unwrap();
    }

    #[test]
    fn nothing_of_the_host() {
        let long = format!("address=/{}/#{}", "a".repeat(LONGEST), "dhcp-script=/bin/sh");
        for text in [
            "dhcp-script=/bin/sh",
            "dhcp-luascript=/x",
            "conf-script=/bin/sh",
            "dhcp-scriptuser=root",
            "script-arp",
            "conf-file=/etc/shadow",
            "conf-dir=/etc",
            "servers-file=/etc/shadow",
            "resolv-file=/etc/shadow",
            "addn-hosts=/etc/shadow",
            "hostsdir=/etc",
            "dhcp-hostsfile=/etc/shadow",
            "dhcp-hostsdir=/etc",
            "dhcp-optsfile=/etc/shadow",
            "dhcp-optsdir=/etc",
            "read-ethers",
            "dhcp-leasefile=/etc/passwd",
            "pid-file=/etc/passwd",
            "log-facility=/etc/passwd",
            "dumpfile=/etc/passwd",
            "dnssec-timestamp=/etc/passwd",
            "enable-tftp",
            "tftp-root=/",
            "user=root",
            "group=root",
            "interface=eth0",
            "auth-server=x,eth0",
            "listen-address=0.0.0.0",
            "dhcp-relay=10.0.0.1,10.0.0.2",
            "bridge-interface=a,b",
            "ra-param=eth0,mtu:../../x,10",
            "ipset=/x/y",
            "nftset=/x/4#inet#t#s",
            "enable-dbus",
            "port=5300",
            "no-such-option",
            "\"dhcp-script\"=/bin/sh",
            "\"dhcp-script=/bin/sh\"",
            "address\"=\n",
            "=x",
            "DHCP-SCRIPT=/bin/sh",
            "\u{a0}dhcp-script=/bin/sh",
            "address=/x/\rdhcp-script=/bin/sh",
            "address=/x/\0",
            &long,
        ] {
            let e = check_lines("config.raw.dnsmasq", text).unwrap_err();
            assert!(e.message.starts_with("line 1: "), "{text:?}: {e}");
            check_lines("x", &format!("no-resolv\n{text}")).unwrap_err();
        }
        assert!(check_lines("x", &"no-resolv\n".repeat(LARGEST)).is_err());
    }
}
