//! Which node of the records this machine is: an id that is made at the first start and kept in `DIR/state/node`, so that
//! everything that is there stays this machine's whatever it is called later. Its name is what the machine is called now;
//! the engine gives it to the record.
//!
//! Instances that began before the file was kept are found by what is recorded: then the id followed from the daemon's id and
//! the name at each start.

use karst_model::{Error, Name, NodeId, Result, node::Node};
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};
use uuid::Uuid;

/// The file in `DIR/state`: the id as text.
pub const FILE: &str = "node";
/// A UUID and the end of its line, and not much more.
const MOST: u64 = 64;

/// What the id of a node is made of at its first start; the same again when all of `DIR/state` is lost.
pub fn first_id(daemon_id: &str, name: &str) -> NodeId {
    NodeId(Uuid::new_v5(&Uuid::NAMESPACE_OID, format!("karst:{daemon_id}:{name}").as_bytes()))
}

/// What this machine is called: its host name where that is a name, else `local`.
pub fn name() -> String {
    let hostname = rustix::system::uname().nodename().to_string_lossy().into_owned();
    Name::parse("node", &hostname).map_or_else(|_| "local".to_owned(), |n| n.to_string())
}

/// The id that is kept in `state`, if there is one.
///
/// # Errors
/// Internal, when the file does not hold an id; what the file system says.
pub fn kept(state: &Path) -> Result<Option<NodeId>> {
    let file = state.join(FILE);
    let mut text = vec![];
    match fs::File::open(&file) {
        Ok(f) => f.take(MOST).read_to_end(&mut text)?,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::from(e).with_context(file.display())),
    };
    let id: Option<NodeId> = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    match id {
        Some(id) => Ok(Some(id)),
        None => Err(Error::internal(
            format!(
                "{} does not hold the id of this node; remove it: it is found again by what is recorded",
                file.display()
            ),
            "damaged",
        )),
    }
}

/// Keeps `id` in `state`: whole or not at all, and on disk before anything carries it.
///
/// # Errors
/// What the file system says.
pub fn keep(state: &Path, id: NodeId) -> Result<()> {
    let fresh = state.join(format!("{FILE}.new"));
    let mut f = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    writeln!(f, "{id}")?;
    f.sync_all()?;
    fs::rename(&fresh, state.join(FILE))?;
    fs::File::open(state)?.sync_all()?;
    Ok(())
}

/// Which node this machine, now called `name`, is, when these are `recorded`. `alone`: nobody else's are among them, because the
/// store is this machine's.
///
/// # Errors
/// Conflict when several are recorded and nothing says which of them it is.
pub fn own(
    recorded: &[Node],
    kept: Option<NodeId>,
    alone: bool,
    daemon_id: &str,
    name: &str,
) -> Result<NodeId> {
    let is_there = |id: NodeId| recorded.iter().any(|n| n.id == id);
    // Where others keep theirs too, one that is not there yet has just come. In a store of this machine alone it is another
    // time's that was put there: what it says of the machine counts, because all that is in it says the same.
    if let Some(kept) = kept
        && (!alone || recorded.is_empty() || is_there(kept))
    {
        return Ok(kept);
    }
    let made = first_id(daemon_id, name);
    match recorded {
        [] => Ok(made),
        _ if is_there(made) => Ok(made),
        [one] => Ok(one.id),
        several => {
            let names: Vec<&str> = several.iter().map(|n| n.name.as_str()).collect();
            Err(Error::conflict(format!(
                "this machine is called {name}, and recorded are {}: nothing says which of them it is; call it by the name that \
                 it had before (hostnamectl set-hostname) for one start",
                names.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAEMON: &str = "abc123";

    fn node(id: NodeId, name: &str) -> Node {
        Node { id, name: Name::parse("node", name).unwrap(), facts: None, starting: None }
    }

    #[test]
    fn the_id_is_kept_and_stays_whatever_the_machine_is_called() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(kept(state.path()).unwrap(), None);
        let id = own(&[], None, true, DAEMON, "debian").unwrap();
        keep(state.path(), id).unwrap();
        assert_eq!(kept(state.path()).unwrap(), Some(id));
        let recorded = [node(id, "debian")];
        assert_eq!(own(&recorded, kept(state.path()).unwrap(), true, DAEMON, "web1").unwrap(), id);
        // Its records are lost, and it is called otherwise.
        assert_eq!(own(&[], kept(state.path()).unwrap(), true, DAEMON, "web1").unwrap(), id);
        keep(state.path(), first_id(DAEMON, "x")).unwrap();
        assert_eq!(kept(state.path()).unwrap(), Some(first_id(DAEMON, "x")), "replaced as a whole");
        for damage in ["", "web1\n", "\u{0}\u{0}"] {
            fs::write(state.path().join(FILE), damage).unwrap();
            let e = kept(state.path()).unwrap_err();
            assert!(e.message.contains("remove it"), "{e:?}");
        }
    }

    #[test]
    fn what_began_before_the_id_was_kept_is_found_by_what_is_recorded() {
        let (a, b) = (node(first_id(DAEMON, "a"), "a"), node(first_id(DAEMON, "b"), "b"));
        // Called as before; called otherwise since.
        assert_eq!(own(std::slice::from_ref(&a), None, true, DAEMON, "a").unwrap(), a.id);
        assert_eq!(own(std::slice::from_ref(&a), None, true, DAEMON, "b").unwrap(), a.id);
        // One that was renamed when its id was kept already.
        let renamed = node(a.id, "c");
        assert_eq!(own(&[renamed], None, true, DAEMON, "d").unwrap(), a.id);
        // Several: the one of its name, else nobody can say.
        let both = [a.clone(), b.clone()];
        for alone in [true, false] {
            assert_eq!(own(&both, None, alone, DAEMON, "a").unwrap(), a.id);
            assert_eq!(own(&both, None, alone, DAEMON, "b").unwrap(), b.id);
            let e = own(&both, None, alone, DAEMON, "c").unwrap_err();
            assert!(e.message.contains("a, b") && e.message.contains("set-hostname"), "{e:?}");
        }
    }

    #[test]
    fn each_of_several_hosts_finds_its_own_and_a_new_one_takes_nobodys() {
        let (a, b) = (node(first_id(DAEMON, "a"), "a"), node(first_id(DAEMON, "b"), "b"));
        let both = [a.clone(), b.clone()];
        assert_eq!(own(&both, Some(a.id), false, DAEMON, "b").unwrap(), a.id, "what it keeps, not its name");
        assert_eq!(own(&both, Some(b.id), false, DAEMON, "x").unwrap(), b.id);
        // The second of a cluster: its id is kept before it sees what is there.
        assert_eq!(own(std::slice::from_ref(&a), Some(b.id), false, DAEMON, "b").unwrap(), b.id);
        // A database of this machine alone that was put back from elsewhere.
        assert_eq!(own(std::slice::from_ref(&a), Some(b.id), true, DAEMON, "b").unwrap(), a.id);
    }
}
