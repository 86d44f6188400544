//! The contract of encrypted volumes: to a pool a container is a disk like any other, and wherever it lies its passphrase opens it,
//! and no other does.

use crate::{Container, NewVolume, PoolDriver, Source};
use karst_host::{Program, exec::Output, run, sandbox::Launcher};
use karst_model::{
    ByteSize, SnapshotId, VolumeId,
    encryption::{Encryption, Passphrase},
    storage::VolumeContent,
};
use std::{
    io::Read,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

/// Bytes of the content.
const CONTENT: usize = 8 << 20;

/// QEMU's view of containers, with the passphrase in a file.
struct Qemu<'a> {
    pool: &'a dyn PoolDriver,
    scratch: &'a Path,
}

impl Qemu<'_> {
    async fn image(&self, volume: VolumeId) -> (PathBuf, String) {
        let path = self.pool.locate(volume, None).await.unwrap().path;
        let device = std::fs::metadata(&path).unwrap().file_type().is_block_device();
        let driver = if device { "host_device" } else { "file" };
        let image =
            format!("driver=luks,key-secret=key,file.driver={driver},file.filename={}", path.display());
        (path, image)
    }

    fn key(&self, words: &str) -> String {
        let key = self.scratch.join("words");
        std::fs::write(&key, words).unwrap();
        format!("secret,id=key,file={}", key.display())
    }

    /// What a passphrase finds in a container.
    async fn read(&self, volume: VolumeId, words: &str) -> Result<Vec<u8>, String> {
        let (_, image) = self.image(volume).await;
        let plain = self.scratch.join("plain");
        let call = run(Program::QemuImg).args(["convert", "-O", "raw", "--object"]).arg(self.key(words));
        let ended = call.arg("--image-opts").arg(image).arg(&plain).output().await.unwrap();
        said(&ended)?;
        let content = std::fs::read(&plain).unwrap();
        std::fs::remove_file(plain).unwrap();
        Ok(content)
    }

    async fn write(&self, volume: VolumeId, words: &str, byte: u8) {
        let (_, image) = self.image(volume).await;
        let plain = self.scratch.join("plain");
        std::fs::write(&plain, vec![byte; CONTENT]).unwrap();
        let call =
            run(Program::QemuImg).args(["convert", "-n", "-f", "raw", "--object"]).arg(self.key(words));
        let ended = call.arg("--target-image-opts").arg(&plain).arg(image).output().await.unwrap();
        said(&ended).unwrap();
        std::fs::remove_file(plain).unwrap();
    }
}

fn said(ended: &Output) -> Result<(), String> {
    match ended.code {
        0 => Ok(()),
        _ => Err(String::from_utf8_lossy(&ended.stderr).into_owned()),
    }
}

/// Runs it. `scratch` is an empty directory; `worker` one of the pool's. Needs root.
pub async fn encrypted(pool: &dyn PoolDriver, scratch: &Path, worker: &Launcher) {
    let (words, made) = ("open sesame, says Ali", Encryption::default());
    let passphrase = Passphrase::of(words.as_bytes()).unwrap();
    let container = Container::make(worker, scratch, made, &passphrase).await.unwrap();
    let size = |content: usize| ByteSize(content as u64 + made.header());
    let new = |source| NewVolume { content: VolumeContent::Block, size: Some(size(CONTENT)), source };
    let [volume, copy] = [(); 2].map(|()| VolumeId(uuid::Uuid::new_v4()));
    pool.create(volume, &new(container.source())).await.unwrap();
    drop(container);
    let qemu = Qemu { pool, scratch };
    qemu.write(volume, words, 0x4b).await;
    let is =
        |content: &[u8], byte: u8| content.len() >= CONTENT && content[..CONTENT].iter().all(|b| *b == byte);
    assert!(is(&qemu.read(volume, words).await.unwrap(), 0x4b), "what was written is read");
    let wrong = qemu.read(volume, "open barley").await.unwrap_err();
    assert!(wrong.contains("Invalid password"), "{wrong}");
    let mut stored = vec![];
    let (path, _) = qemu.image(volume).await;
    let length = size(CONTENT).bytes();
    std::fs::File::open(path).unwrap().take(length).read_to_end(&mut stored).unwrap();
    assert!(stored.starts_with(b"LUKS\xba\xbe\x00\x01") && stored.len() as u64 == length);
    assert!(!stored.windows(64).any(|w| w == [0x4b; 64]), "what is stored is not what was written");

    // It is copied, and grows, without the passphrase.
    pool.create(copy, &new(Source::Volume { volume, snapshot: None })).await.unwrap();
    pool.resize(copy, size(CONTENT + (4 << 20))).await.unwrap();
    let larger = qemu.read(copy, words).await.unwrap();
    assert!(is(&larger, 0x4b) && larger.len() >= CONTENT + (4 << 20), "{}", larger.len());
    if let Some(snapshots) = pool.snapshots() {
        let taken = SnapshotId(uuid::Uuid::new_v4());
        snapshots.create(volume, taken).await.unwrap();
        qemu.write(volume, words, 0x4c).await;
        assert!(is(&qemu.read(volume, words).await.unwrap(), 0x4c));
        snapshots.restore(volume, taken).await.unwrap();
        assert!(is(&qemu.read(volume, words).await.unwrap(), 0x4b), "as it was then");
    }
    assert!(is(&qemu.read(copy, words).await.unwrap(), 0x4b), "the copy is one of its own");
    for volume in [volume, copy] {
        pool.delete(volume).await.unwrap();
    }
    pool.settle().await;
    std::fs::remove_file(scratch.join("words")).unwrap();
}
