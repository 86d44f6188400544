//! One dnsmasq per network: started as its own daemon, so that guests keep DHCP and DNS when the host's process is killed,
//! and found again by its pid file and its argument list.

use crate::{
    record::{self, Paths, Record},
    render::{self, DnsmasqContext},
};
use karst_host::{
    Program,
    process::{Process, Signal},
    run,
};
use karst_model::{Error, NetworkId, Result, spec::NetworkHost};
use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// What dnsmasq gets to end by itself.
const PATIENCE: Duration = Duration::from_secs(2);
/// Exit code for a configuration that it cannot read.
const BAD_CONFIGURATION: i32 = 1;
/// Its log is cut when it grows beyond this.
const LOG_LIMIT: u64 = 1 << 20;

fn argument(paths: &Paths, id: NetworkId) -> OsString {
    let mut argument = OsString::from("--conf-file=");
    argument.push(paths.file(id, "dnsmasq.conf"));
    argument
}

fn is_dnsmasq(arguments: &[OsString], conf: &OsString) -> bool {
    let program = arguments.first().map(PathBuf::from);
    program.is_some_and(|p| p.file_name().is_some_and(|n| n == "dnsmasq")) && arguments[1..].contains(conf)
}

/// The running dnsmasq of a network: by its pid file, or, where that is missing or stale, among all processes.
pub(crate) fn find(paths: &Paths, id: NetworkId) -> Result<Option<Process>> {
    let conf = argument(paths, id);
    let noted = fs::read_to_string(paths.file(id, "dnsmasq.pid"))
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .and_then(Process::open);
    if let Some((process, arguments)) = noted
        && is_dnsmasq(&arguments, &conf)
    {
        return Ok(Some(process));
    }
    Ok(Process::find(|a| is_dnsmasq(a, &conf))?.into_iter().next())
}

/// Ends every dnsmasq of a network.
pub(crate) fn stop(paths: &Paths, id: NetworkId) -> Result<()> {
    let conf = argument(paths, id);
    for process in Process::find(|a| is_dnsmasq(a, &conf))? {
        process.end(PATIENCE)?;
    }
    Ok(())
}

/// Ends every dnsmasq whose configuration lies under the driver's directory.
pub(crate) fn stop_all(paths: &Paths) -> Result<()> {
    let mut prefix = String::from("--conf-file=");
    prefix.push_str(&paths.0.to_string_lossy());
    prefix.push('/');
    let ours =
        |a: &[OsString]| a.len() == 2 && a[1].to_string_lossy().starts_with(&prefix) && is_dnsmasq(a, &a[1]);
    for process in Process::find(ours)? {
        process.end(PATIENCE)?;
    }
    Ok(())
}

/// Every dnsmasq whose configuration lies under the driver's directory and is not that of one of `known`.
pub(crate) fn strays(paths: &Paths, known: &BTreeSet<NetworkId>) -> Result<Vec<String>> {
    let mut prefix = String::from("--conf-file=");
    prefix.push_str(&paths.0.to_string_lossy());
    prefix.push('/');
    let of_known = |a: &OsString| {
        let view = |id: &NetworkId| {
            a.to_string_lossy().starts_with(&format!("{prefix}{id}/views/"))
                && paths.network(*id).join("views").is_dir()
        };
        known.iter().any(|id| *a == argument(paths, *id) || view(id))
    };
    let ours = |a: &[OsString]| {
        a.len() == 2
            && a[1].to_string_lossy().starts_with(&prefix)
            && is_dnsmasq(a, &a[1])
            && !of_known(&a[1])
    };
    Ok(Process::find(ours)?.iter().map(|p| format!("process {}: dnsmasq of no network", p.pid())).collect())
}

/// The user that dnsmasq becomes: Debian's package has one for it.
#[derive(Debug, Clone)]
struct Account {
    user: String,
    group: String,
    gid: u32,
}

fn account() -> Result<Account> {
    let users = fs::read_to_string("/etc/passwd")?;
    let groups = fs::read_to_string("/etc/group")?;
    let field = |line: &str, n: usize| line.split(':').nth(n).map(str::to_owned);
    for name in ["dnsmasq", "nobody"] {
        let Some(gid) = users
            .lines()
            .find(|l| field(l, 0).as_deref() == Some(name))
            .and_then(|l| field(l, 3)?.parse::<u32>().ok())
        else {
            continue;
        };
        let group = groups
            .lines()
            .find(|l| field(l, 2).and_then(|g| g.parse::<u32>().ok()) == Some(gid))
            .and_then(|l| field(l, 0));
        if let Some(group) = group {
            return Ok(Account { user: name.into(), group, gid });
        }
    }
    Err(Error::unsupported("this host has neither a user \"dnsmasq\" nor \"nobody\" to run DHCP and DNS as"))
}

/// The group that may read what is written for it.
pub(crate) fn group() -> Result<u32> {
    Ok(account()?.gid)
}

/// Writes the lists of guests; `true` when something changed.
pub(crate) fn write_hosts(paths: &Paths, record: &Record, hosts: &[NetworkHost]) -> Result<bool> {
    let gid = Some(account()?.gid);
    record::make_directory(&paths.network(record.id), 0o750, gid)?;
    let dhcp = render::dhcp_hosts(hosts);
    let names = render::dns_hosts(&record.spec.domain, hosts) + &render::more_hosts(&record.spec);
    let one = record::write_if_changed(&paths.file(record.id, "dhcp-hosts"), dhcp.as_bytes(), 0o640, gid)?;
    let two = record::write_if_changed(&paths.file(record.id, "hosts"), names.as_bytes(), 0o640, gid)?;
    Ok(one || two)
}

/// Writes the configuration. `None` when the network needs no dnsmasq; otherwise whether it changed, and then whatever ran
/// by the old one was ended *before*: killed in between, the next call sees the change still.
/// `view`: the port of a server of names alone.
pub(crate) fn write_configuration(
    daemon: &str,
    paths: &Paths,
    record: &Record,
    view: Option<u16>,
) -> Result<Option<bool>> {
    let link = karst_host::link::get(&record.bridge)?.ok_or_else(|| {
        Error::conflict(format!("the bridge {:?} was deleted while it was made", record.bridge))
    })?;
    let Some(text) = rendered(daemon, paths, record, link.index, view)? else {
        return Ok(None);
    };
    if view.is_none() {
        reachable(&paths.0)?;
    }
    let path = paths.file(record.id, "dnsmasq.conf");
    if fs::read(&path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(Some(false));
    }
    stop(paths, record.id)?;
    record::write_file(&path, text.as_bytes(), 0o640, Some(account()?.gid), false)?;
    Ok(Some(true))
}

/// The configuration; `None` when the network needs no dnsmasq.
fn rendered(
    daemon: &str,
    paths: &Paths,
    record: &Record,
    link: u32,
    view: Option<u16>,
) -> Result<Option<String>> {
    let account = account()?;
    let resolv = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let context = DnsmasqContext {
        link,
        daemon,
        paths,
        user: &account.user,
        group: &account.group,
        upstream: render::has_upstream(&resolv, record.spec.ipv4.map(|n| n.addr())),
    };
    Ok(render::dnsmasq(record, &context, view))
}

/// Lets dnsmasq look at a configuration with lines that somebody added, before anything is changed for it: the server that runs
/// goes on with the old one. Nothing is run where there are no such lines, or where they are recorded: then they were looked at,
/// and what they make of a newer dnsmasq must not keep bridge and firewall from being there.
///
/// # Errors
/// Invalid, with what it says of the lines.
pub(crate) async fn try_lines(daemon: &str, paths: &Paths, record: &Record) -> Result<()> {
    let Some(lines) = &record.spec.raw_dnsmasq else { return Ok(()) };
    if paths.read(record.id)?.is_some_and(|known| known.spec.raw_dnsmasq.as_ref() == Some(lines)) {
        return Ok(());
    }
    let link = karst_host::link::get(&record.bridge)?.map_or(0, |l| l.index);
    let Some(text) = rendered(daemon, paths, record, link, None)? else { return Ok(()) };
    let own = text.len().saturating_sub(lines.len() + 1);
    let own = text.get(..own).map_or(0, |t| t.lines().count());
    let out = run(Program::Dnsmasq).arg("--test").arg("--conf-file=-").stdin(text).output().await?;
    match out.code {
        0 => Ok(()),
        code => {
            let stderr = String::from_utf8_lossy(&out.stderr).trim().to_owned();
            let context = format!("dnsmasq --test for {}: exit code {code}: {stderr}", record.bridge);
            Err(bad_lines(&stderr, own).with_context(context))
        }
    }
}

/// dnsmasq reads its lists after it gave up root, so every directory above must let it pass.
fn reachable(dir: &Path) -> Result<()> {
    for above in dir.ancestors() {
        if fs::metadata(above)?.permissions().mode() & 0o001 == 0 {
            return Err(Error::unsupported(format!(
                "DHCP and DNS run without privileges and cannot pass through the directory {}; allow it with chmod o+x",
                above.display()
            )));
        }
    }
    Ok(())
}

/// Starts it. It answers (its parent returns) only when its sockets are open.
pub(crate) async fn start(paths: &Paths, record: &Record) -> Result<Process> {
    let out = run(Program::Dnsmasq).arg(argument(paths, record.id)).output().await?;
    if out.code != 0 {
        let stderr = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        let context = format!("dnsmasq for {}: exit code {}: {stderr}", record.bridge, out.code);
        if out.code == BAD_CONFIGURATION && record.spec.raw_dnsmasq.is_some() {
            return Err(bad_lines(&stderr, usize::MAX).with_context(context));
        }
        return Err(if stderr.contains("in use") {
            Error::conflict(format!(
                "DHCP and DNS of {:?} cannot start: another server holds port 53 or 67 on all addresses; let it listen on its \
                 own interfaces only (dnsmasq: bind-interfaces)",
                record.bridge
            ))
            .with_context(context)
        } else {
            Error::internal(format!("DHCP and DNS of {:?} could not be started", record.bridge), context)
        });
    }
    find(paths, record.id)?.ok_or_else(|| {
        Error::internal(
            format!("DHCP and DNS of {:?} ended at once", record.bridge),
            log_tail(paths, record.id),
        )
    })
}

/// What dnsmasq says of lines that somebody added after `own` others, without the places of this host.
fn bad_lines(stderr: &str, own: usize) -> Error {
    let words = stderr.lines().last().unwrap_or_default();
    let words = words.strip_prefix("dnsmasq: ").unwrap_or(words).trim();
    let words = words.split(" of /").next().unwrap_or_default();
    let words = words.strip_suffix(" of stdin").unwrap_or(words);
    let number = words.rsplit_once(" at line ").and_then(|(what, n)| Some((what, n.parse::<usize>().ok()?)));
    let said = match number {
        _ if words.is_empty() => "it does not start".to_owned(),
        Some((what, n)) if n > own => format!("{what} at line {} of them", n - own),
        _ => words.to_owned(),
    };
    Error::invalid(
        "config.raw.dnsmasq",
        format!("dnsmasq refuses its configuration with these lines: {said}"),
    )
}

/// Makes it read the lists of guests again.
pub(crate) fn reload(process: &Process) -> Result<()> {
    process.signal(Signal::HUP)
}

/// The end of its log, for errors.
pub(crate) fn log_tail(paths: &Paths, id: NetworkId) -> String {
    let text = fs::read_to_string(paths.file(id, "dnsmasq.log")).unwrap_or_default();
    let start = text.len().saturating_sub(2000);
    text.get(start..).unwrap_or(&text).to_owned()
}

/// Keeps the log bounded. dnsmasq appends, so an emptied file is simply written on.
pub(crate) fn trim_log(paths: &Paths, id: NetworkId) {
    let path = paths.file(id, "dnsmasq.log");
    if fs::metadata(&path).is_ok_and(|m| m.len() > LOG_LIMIT) {
        let cut = fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(0));
        if let Err(e) = cut {
            tracing::warn!(path = %path.display(), error = %e, "the log of dnsmasq could not be cut");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_lines_are_told_without_places() {
        let e = bad_lines("\ndnsmasq: bad option at line 25 of /var/lib/x/dnsmasq.conf", usize::MAX);
        assert!(e.message.ends_with("bad option at line 25") && e.field.is_some(), "{e}");
        let e = bad_lines("\ndnsmasq: bad dhcp-option at line 25 of stdin", 23);
        assert!(e.message.ends_with("bad dhcp-option at line 2 of them"), "{e}");
        assert!(bad_lines("", 3).message.ends_with("it does not start"));
    }

    #[test]
    fn identity_is_program_and_configuration() {
        let paths = Paths("/d".into());
        let id = NetworkId(uuid::Uuid::from_u128(1));
        let conf = argument(&paths, id);
        let ours: Vec<OsString> = vec!["/usr/sbin/dnsmasq".into(), conf.clone()];
        assert!(is_dnsmasq(&ours, &conf));
        for other in
            [vec![], vec!["vi".into(), conf.clone()], vec!["dnsmasq".into(), "--conf-file=/e".into()]]
        {
            assert!(!is_dnsmasq(&other, &conf), "{other:?}");
        }
    }
}
