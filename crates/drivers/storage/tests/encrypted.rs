//! Containers of LUKS as volumes, on real file systems, and read by QEMU's own program.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

#[path = "../../../testkit/src/backends.rs"]
mod backends;

use karst_host::sandbox::Launcher;
use karst_model::{
    ByteSize, ErrorKind, SnapshotId, VolumeId,
    encryption::{Cipher, Encryption, Hash, Iv, Mode, Passphrase},
    storage::VolumeContent,
};
use karst_storage::{Container, FilePool, Format, NewVolume, PoolDriver, Source};
use std::{path::Path, process::Command};

const WORDS: &str = "open sesame, says Ali";
const CONTENT: u64 = 8 << 20;

fn launcher() -> Launcher {
    let program = env!("CARGO_BIN_EXE_karst-storage-worker").into();
    Launcher { program, args: vec![], id_base: 1_900_300_000 }
}

/// Runs commands of `qemu-io` on a container; answers what it said, and whether all went well.
fn qemu_io(disk: &Path, key: &Path, commands: &[&str]) -> (bool, String) {
    let mut call = Command::new("qemu-io");
    call.arg("--object").arg(format!("secret,id=key,file={}", key.display()));
    for command in commands {
        call.args(["-c", command]);
    }
    let image = format!("driver=luks,key-secret=key,file.driver=file,file.filename={}", disk.display());
    let ended = call.arg("--image-opts").arg(image).output().expect("qemu-io (package qemu-utils)");
    let said = [ended.stdout, ended.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    // A pattern that is not there is no failure of the program.
    (ended.status.success() && !said.contains("Pattern verification failed"), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_an_encrypted_volume_is_read_with_its_passphrase_only() {
    if !backends::root() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let pool = FilePool::directory(d.path().join("pool"), launcher()).await.unwrap();
    let staging = d.path().join("staging");
    std::fs::create_dir(&staging).unwrap();
    let (words, encryption) = (Passphrase::of(WORDS.as_bytes()).unwrap(), Encryption::default());
    let container = Container::make(&launcher(), &staging, encryption, &words).await.unwrap();
    let new = |source: Source, content: u64| NewVolume {
        content: VolumeContent::Block,
        size: Some(ByteSize(content + encryption.header())),
        source,
    };
    let volume = VolumeId(uuid::Uuid::new_v4());
    let made = pool.create(volume, &new(container.source(), CONTENT)).await.unwrap();
    drop(container);
    assert_eq!(std::fs::read_dir(&staging).unwrap().count(), 0, "nothing is left of the making");
    assert_eq!((made.format, made.size), (Format::Raw, Some(ByteSize(CONTENT + encryption.header()))));
    let said = Command::new("grep").args(["-rlF", WORDS]).arg(d.path()).output().unwrap();
    assert!(said.stdout.is_empty(), "the passphrase is in no file: {said:?}");

    let keys = tempfile::tempdir().unwrap();
    let (right, wrong) = (keys.path().join("right"), keys.path().join("wrong"));
    std::fs::write(&right, WORDS).unwrap();
    std::fs::write(&wrong, "open barley").unwrap();
    let disk = pool.locate(volume, None).await.unwrap().path;
    let (good, said) = qemu_io(&disk, &right, &["write -P 0x4b 7M 1M", "flush", "read -P 0x4b 7M 1M"]);
    assert!(good, "{said}");
    let (good, said) = qemu_io(&disk, &right, &["read 8M 512"]);
    assert!(
        !good || said.contains("past end") || said.contains("error"),
        "as large as was asked for: {said}"
    );
    let (good, said) = qemu_io(&disk, &wrong, &["read 0 512"]);
    assert!(!good && said.contains("Invalid password"), "{said}");
    let stored = std::fs::read(&disk).unwrap();
    assert!(!stored.windows(64).any(|w| w == [0x4b; 64]), "what lies in the pool is not what was written");

    // Copies and snapshots are the same container, and it grows without the passphrase.
    let snapshot = SnapshotId(uuid::Uuid::new_v4());
    pool.snapshots().unwrap().create(volume, snapshot).await.unwrap();
    let copy = VolumeId(uuid::Uuid::new_v4());
    let source = Source::Volume { volume, snapshot: None };
    pool.create(copy, &new(source, CONTENT)).await.unwrap();
    pool.resize(copy, ByteSize(2 * CONTENT + encryption.header())).await.unwrap();
    let copied = pool.locate(copy, None).await.unwrap().path;
    let (good, said) = qemu_io(&copied, &right, &["read -P 0x4b 7M 1M", "write -P 0x4c 15M 1M"]);
    assert!(good, "{said}");
    assert!(qemu_io(&disk, &right, &["write -P 0x4d 7M 1M"]).0);
    pool.snapshots().unwrap().restore(volume, snapshot).await.unwrap();
    let disk = pool.locate(volume, None).await.unwrap().path;
    let (good, said) = qemu_io(&disk, &right, &["read -P 0x4b 7M 1M"]);
    assert!(good, "{said}");
    for volume in [volume, copy] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_are_where_the_model_says_whatever_the_cipher() {
    if !backends::root() {
        return;
    }
    let d = tempfile::tempdir().unwrap();
    let words = Passphrase::of(WORDS.as_bytes()).unwrap();
    let usual = Encryption::default();
    for made in [
        usual,
        Encryption { cipher: Cipher::Aes128, hash: Hash::Sha512, ..usual },
        Encryption { mode: Mode::Cbc, iv: Iv::Essiv, ..usual },
    ] {
        // It compares where the content begins with what was said.
        let outcome = Container::make(&launcher(), d.path(), made, &words).await;
        drop(outcome.unwrap_or_else(|e| panic!("{made:?}: {e} {:?}", e.context)));
    }
    // Not every QEMU has it; one that has not says so.
    let serpent = Encryption { cipher: Cipher::Serpent256, ..usual };
    if let Err(e) = Container::make(&launcher(), d.path(), serpent, &words).await {
        assert!(e.is(ErrorKind::Unsupported) && e.field.is_some(), "{e} {:?}", e.context);
    }
    assert_eq!(std::fs::read_dir(d.path()).unwrap().count(), 0);
}
