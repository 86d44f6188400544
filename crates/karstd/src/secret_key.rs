//! The key that values of secrets are sealed with: `DIR/state/secrets.key`, of control's user alone, beside the server's own
//! key and outside of the database. Who has the database without it has no value.

use karst_engine::secrets::{KEY, SecretKey};
use karst_env::Env;
use karst_model::{Error, Result};
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

/// Its file.
pub const FILE: &str = "secrets.key";

/// Reads the key below `directory`, made at the first call.
///
/// # Errors
/// Internal, when the file is not the key of this daemon or others can read it; what the file system says.
pub fn load(directory: &Path, env: &dyn Env) -> Result<SecretKey> {
    let file = directory.join(FILE);
    let found = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&file);
    let f = match found {
        Ok(f) => f,
        Err(e) if e.kind() == ErrorKind::NotFound => return make(directory, env),
        Err(e) => return Err(Error::from(e).with_context(file.display())),
    };
    let broken = |why: &str| Error::internal(format!("{FILE} {why}"), file.display());
    let metadata = f.metadata()?;
    if !metadata.is_file() || metadata.mode() & 0o077 != 0 {
        return Err(broken("can be read by others than its owner; give it mode 0600"));
    }
    let mut bytes = vec![];
    f.take(KEY as u64 + 1).read_to_end(&mut bytes)?;
    let key = <[u8; KEY]>::try_from(bytes.as_slice());
    SecretKey::new(&key.map_err(|_| broken("is no key; restore it, or remove it and set all secrets again"))?)
}

fn make(directory: &Path, env: &dyn Env) -> Result<SecretKey> {
    let mut bytes = [0; KEY];
    env.fill_random(&mut bytes);
    let key = SecretKey::new(&bytes)?;
    let fresh = directory.join(format!("{FILE}.new"));
    // What an earlier attempt left may have another mode.
    match fs::remove_file(&fresh) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    let mut f = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
    f.write_all(&bytes)?;
    f.sync_all()?;
    fs::rename(&fresh, directory.join(FILE))?;
    fs::File::open(directory)?.sync_all()?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_key_is_made_once_and_is_its_owners_alone() {
        let env = karst_env::RealEnv::shared();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join(FILE);
        load(directory.path(), &*env).unwrap();
        let first = fs::read(&file).unwrap();
        assert_eq!((first.len(), fs::metadata(&file).unwrap().mode() & 0o777), (KEY, 0o600));
        load(directory.path(), &*env).unwrap();
        assert_eq!(fs::read(&file).unwrap(), first, "it stays");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(load(directory.path(), &*env).unwrap_err().message.contains("0600"));
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&file, &first[1..]).unwrap();
        assert!(load(directory.path(), &*env).unwrap_err().message.contains("no key"));
        assert_eq!(fs::read(&file).unwrap(), first[1..], "nothing is written over it");
    }
}
