"""What outlives a scheduler: ledger, checkpoints and their copies, the published model.

- Where checkpoints are: by default in the scheduler's state directory (bulk kind ``checkpoint``), so a lost
  parameter server takes nothing with it.
- Checkpoints at a path or URL: the parameter server's worker writes them (its owner allows the place), whole
  by one rename or with ``state.json`` last, and prunes all but K of ``<place>/<job>/<round>``; the ledger
  forgets the same ones. One that proves damaged when it is restored is forgotten, and the one before it
  taken.
- Copies of checkpoints: with ``checkpoint.replicas = R`` what is kept at the scheduler is copied to R leased
  workers whose owners offer ``storage.checkpoints_gb``; the newest one only, in the background, the parameter
  server's worker last. Who offers storage is found out by asking (``HoldCheckpoint``: answered with the files
  that are missing, again after they were sent; with none missing the copy is complete). Only who holds a
  lease may leave a copy; only the PeerID that left it may read, replace or drop it. ``keep`` of the request
  names all rounds that stay, so a copy is K deep like the original. It outlives leases and the worker's
  process, is dropped when the job is done, and deleted when nobody asked about it for ``storage.keep_days``.
- Getting copies back: by the scheduler into its own directory, so that nobody else needs to be let in, and
  restoring works as ever. Places are in the ledger, the workers' present addresses in the DHT
  (``checkpoints/<scheduler>/<job>``), hashes in the ledger. A copy holds the ledger too: where the whole
  state directory is gone, the DHT leads to the newest copy, and the job goes on from there (``--fresh`` drops
  the copies instead).
- A copy of a checkpoint: is signed by the scheduler's key (``Node.sign``), so that no worker can make one up;
  anybody could announce one.
- A job that is told to stop: the parameter server is asked for a checkpoint of the open round as it began
  (``SaveCheckpoint``), and waited for 1.8 s; then the one before has to do, and the log says so.
- Parameter server lost: a new generation of the job from the newest verified checkpoint, else from theta_0.
  Training executors live on (``Rejoin``): where no round is lost they keep the open round, its slices and
  their update, and send that again; else they start over in place, with a fresh optimizer.
- Scheduler restarted: an unfinished job with the same description goes on as a new generation. The ledger
  names the leases that the killed one held: they are renewed at once, and who still runs rejoins, the
  parameter server included, so nothing is lost. Where the parameter server's lease is over too, it is as
  above. A changed description is refused; a lock file keeps a second scheduler out.
- A full disk: is said by name where it is. A worker offers nothing while it has less than 32 MB, lets go of
  cached slices first, and ends the executor whose files cannot come in (``ExecutorError(disk)``); the
  scheduler waits in ``Ledger.run``, and the parameter server with its export; publishing ends the job with
  exit code 6, to be resumed.
- fsync: checkpoints, exports and models; updates, theta and slices are verified by hash and can be sent
  again.
"""
