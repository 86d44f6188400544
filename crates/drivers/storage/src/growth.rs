//! Disks that become larger while nothing has them open.

use crate::{
    FilePool, Format,
    files::{blocking, done, open},
    states::{self, Record},
};
use karst_host::Program;
use karst_model::{ByteSize, Result};
use std::{fs::File, path::Path};

/// Makes a raw file larger.
pub(crate) fn grow_raw(disk: &Path, size: u64) -> Result<()> {
    let disk = File::options().write(true).open(disk)?;
    disk.set_len(size)?;
    Ok(disk.sync_all()?)
}

impl FilePool {
    /// Makes the file of a disk larger; the record is the caller's.
    pub(crate) async fn grow(&self, state: &Path, record: &Record, size: ByteSize) -> Result<()> {
        let disk = state.join(record.disk());
        if record.active_format() == Format::Raw {
            return blocking(move || grow_raw(&disk, size.0)).await;
        }
        let (at, grown) = (state.to_owned(), disk.clone());
        let layer = record.active() > 0;
        // The worker has no guest's ids.
        blocking(move || {
            // Those of a machine that was killed would keep it from growing; no instance has checkpoints in them now.
            states::forget_bitmaps(&grown)?;
            if layer {
                states::forget_backing(&grown)?;
            }
            states::give(&at, 0)
        })
        .await?;
        let mut sandbox = self.sandbox().writable("disk.img", open(&disk, true)?);
        if record.based && !layer {
            sandbox = sandbox.readable("base.img", open(&state.join("base.img"), false)?);
        }
        let size = size.0.to_string();
        let args = ["resize", "-q", "-f", "qcow2", "/disk.img", &size];
        done(sandbox.exec(Program::QemuImg, &args).await?)
    }
}
